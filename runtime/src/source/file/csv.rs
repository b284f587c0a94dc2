//! A line (or quoted record) of CSV to a value.
//!
//! The fields are cut here, without a reader around each line, into a record that is kept from line
//! to line; the csv crate turns the record into the user's type: by the header's names where there
//! is a header, by position otherwise. An empty field is `None` for an `Option`. What else stands
//! for "no value" (`NA`, say) is the type's business: a `String`, or a field with
//! `#[serde(deserialize_with = "csv::invalid_option")]`, which takes anything unreadable as `None`.
//!
//! Invariants:
//! - fields are cut as [`super::lines`] finds the ends of quoted records: a quote means something
//!   at a field's first byte and inside a quoted field only;
//! - any bytes give a value or a reason, never a panic; a reason names the field and its value.
//!
//! Called by the file source for each record.

use super::columns;
use super::lines::Quoting;
use csv::{ByteRecord, ErrorKind, StringRecord};
use memchr::{memchr, memchr_iter};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Characters of an offending value that a reason shows.
const SHOWN: usize = 64;

/// Characters of a header that are shown.
const NAMES_SHOWN: usize = 400;

/// How fields are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dialect {
    /// Ends a field.
    pub delimiter: u8,
    /// Encloses a field that holds delimiters, quotes (doubled) or line ends; `None`: nothing does.
    pub quote: Option<u8>,
}

impl Default for Dialect {
    fn default() -> Self {
        Self { delimiter: b',', quote: Some(b'"') }
    }
}

impl Dialect {
    /// What makes a reader keep line ends within quotes; `None` where nothing is quoted.
    #[must_use]
    pub fn quoting(self) -> Option<Quoting> {
        self.quote.map(|quote| Quoting { quote, delimiter: self.delimiter })
    }
}

/// Decodes the records of one source.
#[derive(Debug)]
pub struct CsvDecoder {
    dialect: Dialect,
    header: Option<StringRecord>,
    record: StringRecord,
    field: Vec<u8>,
}

impl CsvDecoder {
    /// A decoder for records under `header`, as [`super::split::header`] gives it; `None`: fields
    /// are taken by position.
    ///
    /// # Errors
    /// When the header is not UTF-8, has an open quote, or names a column twice.
    pub fn new(dialect: Dialect, header: Option<&[u8]>) -> Result<Self, String> {
        let mut decoder =
            Self { dialect, header: None, record: StringRecord::new(), field: Vec::new() };
        if let Some(line) = header {
            decoder.cut(line).map_err(|reason| format!("the CSV header is unusable: {reason}"))?;
            let names = std::mem::take(&mut decoder.record);
            let mut sorted: Vec<&str> = names.iter().collect();
            sorted.sort_unstable();
            if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(format!("the CSV header names column {:?} twice", pair[0]));
            }
            decoder.header = Some(names);
        }
        Ok(decoder)
    }

    /// Whether the header has what `T` needs, as far as that can be told without a record.
    ///
    /// # Errors
    /// Which column it lacks.
    pub fn check_header<T: DeserializeOwned>(&self) -> Result<(), String> {
        let header = self.header.as_ref();
        match header.and_then(columns::missing::<T>) {
            Some(field) => Err(lacking(&format!("missing field `{field}`"), header)),
            None => Ok(()),
        }
    }

    /// Decodes one record; `T` may borrow its texts from the decoder.
    ///
    /// # Errors
    /// The reason, for the rejects file.
    pub fn decode<'a, T: Deserialize<'a>>(&'a mut self, line: &[u8]) -> Result<T, String> {
        self.cut(line)?;
        let Self { header, record, .. } = self;
        if let Some(header) = header
            && header.len() != record.len()
        {
            return Err(format!(
                "the record has {} fields, the header {}",
                record.len(),
                header.len()
            ));
        }
        record.deserialize(header.as_ref()).map_err(|error| reason(header.as_ref(), record, error))
    }

    /// Cuts a line into the fields of `self.record`.
    fn cut(&mut self, line: &[u8]) -> Result<(), String> {
        let mut record = std::mem::take(&mut self.record).into_byte_record();
        record.clear();
        let quote = self.dialect.quote.filter(|quote| memchr(*quote, line).is_some());
        let cut = match quote {
            Some(quote) => {
                cut_quoted(line, self.dialect.delimiter, quote, &mut record, &mut self.field)
            }
            None => {
                cut_plain(line, self.dialect.delimiter, &mut record);
                Ok(())
            }
        };
        match StringRecord::from_byte_record(record) {
            Ok(record) => self.record = record,
            Err(error) => {
                let index = error.utf8_error().field();
                let record = error.into_byte_record();
                let value = String::from_utf8_lossy(record.get(index).unwrap_or_default());
                return Err(describe(self.header.as_ref(), index, &value, "not UTF-8"));
            }
        }
        cut
    }
}

fn cut_plain(line: &[u8], delimiter: u8, record: &mut ByteRecord) {
    let mut start = 0;
    for at in memchr_iter(delimiter, line) {
        record.push_field(&line[start..at]);
        start = at + 1;
    }
    record.push_field(&line[start..]);
}

/// As `cut_plain`, with `field` as the room in which a quoted field loses its quotes.
fn cut_quoted(
    line: &[u8],
    delimiter: u8,
    quote: u8,
    record: &mut ByteRecord,
    field: &mut Vec<u8>,
) -> Result<(), String> {
    let mut rest = line;
    loop {
        field.clear();
        if let [first, quoted @ ..] = rest
            && *first == quote
        {
            rest = quoted;
            loop {
                let Some(at) = memchr(quote, rest) else {
                    return Err(format!(
                        "field {} opens a quote that is not closed on the line; read files whose \
                         fields hold line ends with --no-split",
                        record.len() + 1
                    ));
                };
                field.extend_from_slice(&rest[..at]);
                rest = &rest[at + 1..];
                match rest {
                    [next, tail @ ..] if *next == quote => {
                        field.push(quote);
                        rest = tail;
                    }
                    _ => break,
                }
            }
        }
        // The whole of a plain field, or what stands behind a closing quote.
        let end = memchr(delimiter, rest);
        field.extend_from_slice(&rest[..end.unwrap_or(rest.len())]);
        record.push_field(field);
        match end {
            Some(end) => rest = &rest[end + 1..],
            None => return Ok(()),
        }
    }
}

#[cold]
fn reason(header: Option<&StringRecord>, record: &StringRecord, error: csv::Error) -> String {
    let ErrorKind::Deserialize { err, .. } = error.kind() else {
        return error.to_string();
    };
    let what = err.kind().to_string();
    if let Some(index) = err.field().and_then(|field| usize::try_from(field).ok()) {
        return describe(header, index, record.get(index).unwrap_or_default(), &what);
    }
    if lacks_column(&what) { lacking(&what, header) } else { what }
}

/// A reason with the columns that there are.
fn lacking(what: &str, header: Option<&StringRecord>) -> String {
    let Some(header) = header else { return what.into() };
    let names = header.iter().collect::<Vec<_>>().join(", ");
    if names.trim_matches(|c: char| c.is_whitespace() || c == ',').is_empty() {
        return format!("{what}; the first line, which names the columns, is blank");
    }
    let shown: String = names.chars().take(NAMES_SHOWN).flat_map(char::escape_debug).collect();
    let more = if names.chars().nth(NAMES_SHOWN).is_some() { "…" } else { "" };
    format!("{what}; the columns are {shown}{more}")
}

/// Whether this is the reason of a record whose header lacks a column that its type needs: so it is
/// with every record. (The deserializer's error kinds have none of its own for this.)
pub fn lacks_column(reason: &str) -> bool {
    reason.starts_with("missing field")
}

/// A reason that names a field and shows its value.
#[cold]
fn describe(header: Option<&StringRecord>, index: usize, value: &str, what: &str) -> String {
    let shown: String = value.chars().take(SHOWN).collect();
    let more = if shown.len() < value.len() { "…" } else { "" };
    let column = index + 1;
    match header.and_then(|header| header.get(index)) {
        Some(name) => format!("field {name:?} (column {column}) is {shown:?}{more}: {what}"),
        None => format!("column {column} is {shown:?}{more}: {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize, Debug, PartialEq)]
    struct Row {
        origin: String,
        #[serde(rename = "dep_delay")]
        delay: Option<i32>,
    }

    const HEADER: &[u8] = b"year,dep_delay,origin";

    fn decoder() -> CsvDecoder {
        CsvDecoder::new(Dialect::default(), Some(HEADER)).expect("the header is sound")
    }

    fn refused(line: &[u8]) -> String {
        decoder().decode::<Row>(line).expect_err("the line is unsound")
    }

    #[test]
    fn fields_are_taken_by_name_and_an_empty_one_is_none() {
        let mut decoder = decoder();
        let row: Row = decoder.decode(b"2013,-4,EWR").unwrap();
        assert_eq!(row, Row { origin: "EWR".into(), delay: Some(-4) });
        let row: Row = decoder.decode(b"2013,,\"JFK, \"\"NY\"\"\"").unwrap();
        assert_eq!(row, Row { origin: "JFK, \"NY\"".into(), delay: None });
    }

    #[test]
    fn a_reason_names_the_field_and_shows_its_value() {
        assert_eq!(
            refused(b"2013,NA,EWR"),
            "field \"dep_delay\" (column 2) is \"NA\": invalid digit found in string"
        );
        assert_eq!(
            refused(b"2013,1,E\xffR"),
            "field \"origin\" (column 3) is \"E\u{FFFD}R\": not UTF-8"
        );
        assert!(refused(&[b"1,", &[b'x'; 99][..], b",a"].concat()).contains("xxx\"…: invalid"));
        assert_eq!(refused(b"2013,1"), "the record has 2 fields, the header 3");
        assert!(refused(b"2013,1,\"EWR").starts_with("field 3 opens a quote"));
        assert_eq!(refused(b""), "the record has 1 fields, the header 3");
    }

    #[test]
    fn a_missing_column_is_told_with_those_there_are() {
        let mut decoder = CsvDecoder::new(Dialect::default(), Some(b"a,b")).unwrap();
        let reason = decoder.decode::<Row>(b"1,2").unwrap_err();
        assert_eq!(reason, "missing field `origin`; the columns are a, b");
    }

    #[test]
    fn without_a_header_fields_are_taken_by_position_and_may_be_borrowed() {
        let dialect = Dialect { delimiter: b';', quote: None };
        let mut decoder = CsvDecoder::new(dialect, None).unwrap();
        let row: (u8, &str, f64) = decoder.decode(b"7;\"x;1.5").unwrap();
        assert_eq!(row, (7, "\"x", 1.5));
        let reason = decoder.decode::<(u8, String)>(b"777;y").unwrap_err();
        assert!(reason.starts_with("column 1 is \"777\": number too large"), "{reason}");
    }

    #[test]
    fn unreadable_values_can_be_none() {
        #[derive(Deserialize)]
        struct Loose {
            #[serde(deserialize_with = "csv::invalid_option")]
            dep_delay: Option<i32>,
        }
        let mut decoder = decoder();
        assert_eq!(decoder.decode::<Loose>(b"2013,NA,EWR").unwrap().dep_delay, None);
        assert_eq!(decoder.decode::<Loose>(b"2013,9,EWR").unwrap().dep_delay, Some(9));
    }

    #[test]
    fn a_header_with_a_column_twice_or_an_open_quote_is_refused() {
        let error = |header: &[u8]| CsvDecoder::new(Dialect::default(), Some(header)).unwrap_err();
        assert_eq!(error(b"b,a,b"), "the CSV header names column \"b\" twice");
        assert!(error(b"a,\"b").contains("opens a quote"));
    }

    #[test]
    fn quoted_fields_are_cut_as_the_csv_crate_cuts_them() {
        let (mut state, mut compared) = (3_u64, 0);
        for _ in 0..2000 {
            let line: Vec<u8> = (0..12)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    b"\"\",a\nb"[(state >> 33) as usize % 6]
                })
                .collect();
            let mut decoder = CsvDecoder::new(Dialect::default(), None).unwrap();
            let own = decoder.decode::<Vec<String>>(&line);
            // A terminator that does not occur, for the line is one record already.
            let theirs = csv::ReaderBuilder::new()
                .has_headers(false)
                .terminator(csv::Terminator::Any(b'\x01'))
                .from_reader(line.as_slice())
                .deserialize::<Vec<String>>()
                .next();
            if let (Ok(own), Some(Ok(theirs))) = (own, theirs) {
                assert_eq!(own, theirs, "{:?}", String::from_utf8_lossy(&line));
                compared += 1;
            }
        }
        assert!(compared > 500, "only {compared} lines were sound");
    }
}
