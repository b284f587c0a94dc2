//! A line of JSON to a value.
//!
//! Invariant: any bytes give a value or a reason, never a panic; the reason is one that a person
//! can act on: what is wrong, at which column, and the text just before it.
//!
//! Called by the file source for each line.

use serde::Deserialize;
use serde_json::error::Category;

/// Bytes of the line shown before the place where it went wrong.
const SHOWN: usize = 32;

/// Decodes one line; unknown members are ignored unless the type says otherwise.
///
/// # Errors
/// The reason, for the rejects file.
pub fn decode<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(line).map_err(|error| reason(line, &error))
}

#[cold]
fn reason(line: &[u8], error: &serde_json::Error) -> String {
    let what = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let what = what.strip_suffix(&place).unwrap_or(&what);
    if error.column() == 0 {
        return what.to_owned();
    }
    let end = error.column().min(line.len());
    let near = String::from_utf8_lossy(&line[end.saturating_sub(SHOWN)..end]);
    let kind = if error.classify() == Category::Data { "column" } else { "not JSON at column" };
    format!("{kind} {}, after {near:?}: {what}", error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize, Debug, PartialEq)]
    struct Row {
        id: u64,
        name: Option<String>,
    }

    #[test]
    fn a_line_becomes_a_value() {
        let row: Row = decode(br#"{"name":"x\ny","more":[1,2],"id":7}"#).unwrap();
        assert_eq!(row, Row { id: 7, name: Some("x\ny".into()) });
        assert_eq!(decode::<Row>(br#"{"id":7}"#).unwrap().name, None);
    }

    #[test]
    fn a_value_of_the_wrong_type_is_shown_with_its_field() {
        let reason = decode::<Row>(br#"{"id":"NA","name":null}"#).unwrap_err();
        assert_eq!(
            reason,
            r#"column 10, after "{\"id\":\"NA\"": invalid type: string "NA", expected u64"#
        );
    }

    #[test]
    fn a_missing_field_is_named() {
        assert!(decode::<Row>(b"{}").unwrap_err().contains("missing field `id`"));
    }

    #[test]
    fn what_is_not_json_says_where() {
        for line in [&b"{\"id\":1"[..], b"", b"{\"id\":1}}", b"{\"id\":1,\"name\":\"\xff\"}", b"{]"]
        {
            let reason = decode::<Row>(line).unwrap_err();
            assert!(reason.starts_with("not JSON at column") || line.is_empty(), "{reason}");
            assert!(!reason.contains("at line"), "{reason}");
        }
    }
}
