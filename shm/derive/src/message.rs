//! What the attribute tells the user: each says what is wrong, where, and what to write instead.

/// For an argument that does not exist.
pub(crate) const ARGUMENT: &str =
    "unknown argument of `record`: it takes `archived` and `crate = path`";

/// For an enum, a union or the like without `archived`.
pub(crate) fn not_a_struct(name: &str) -> String {
    format!(
        "`{name}` is not a struct, and a plain record must be one: write `#[record(archived)]`, \
         which takes enums too"
    )
}

/// For a union with `archived`.
pub(crate) fn union(name: &str) -> String {
    format!("`{name}` is a union, whose bytes do not say what they are: make it an enum")
}

/// For a type with parameters.
pub(crate) fn generics(name: &str) -> String {
    format!(
        "`{name}` has parameters, and a record must have one layout: write a struct for each \
         type that you need (tuples, `Option` and `Vec` of records are records already)"
    )
}

/// For a type that contains itself.
pub(crate) fn recursion(name: &str) -> String {
    format!(
        "`{name}` contains itself, so its depth has no bound: keep the parts in one `Vec` and \
         refer to them by index"
    )
}

/// For a struct or enum without anything in it.
pub(crate) fn empty(name: &str) -> String {
    format!("`{name}` has nothing in it, so its records could not be counted: add a field")
}

/// For a `repr` that contradicts the one which the attribute adds.
pub(crate) fn layout(name: &str) -> String {
    format!("the layout of `{name}` is chosen by `record` (`repr(C)`): remove this `repr`")
}

/// For a field whose type is known not to be plain.
pub(crate) fn not_plain(name: &str, field: &str, ty: &str) -> String {
    let instead = match ty {
        "usize" => "write `u64`, which has one size everywhere".to_owned(),
        "isize" => "write `i64`, which has one size everywhere".to_owned(),
        "u128" | "i128" => "write `[u64; 2]`, which needs no alignment of 16".to_owned(),
        "bool" => "write `u8`, or `#[record(archived)]`".to_owned(),
        "char" => "write `u32`, or `#[record(archived)]`".to_owned(),
        _ => "write `#[record(archived)]`, which takes any record as a field".to_owned(),
    };
    format!("field `{field}` of `{name}` is not plain ({ty}): {instead}")
}

/// For `bytes` of padding behind a field; `last` when no field follows, `pad` a free name (`None`
/// in tuple structs).
pub(crate) fn padding(
    name: &str,
    field: &str,
    bytes: usize,
    last: bool,
    pad: Option<&str>,
) -> String {
    let noun = if bytes == 1 { "byte" } else { "bytes" };
    let add = match pad {
        Some(pad) => format!("add a field `{pad}: [u8; {bytes}]` after it"),
        None => format!("add a field `[u8; {bytes}]` after it"),
    };
    let or = if last { "or make it larger" } else { "or put larger fields first" };
    format!("field `{field}` of `{name}` is followed by {bytes} {noun} of padding: {add}, {or}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_padding_message_says_where_how_much_and_what_to_add() {
        assert_eq!(
            padding("Event", "kind", 3, false, Some("_pad")),
            "field `kind` of `Event` is followed by 3 bytes of padding: \
             add a field `_pad: [u8; 3]` after it, or put larger fields first"
        );
        assert_eq!(
            padding("Event", "kind", 1, true, Some("_pad2")),
            "field `kind` of `Event` is followed by 1 byte of padding: \
             add a field `_pad2: [u8; 1]` after it, or make it larger"
        );
        assert_eq!(
            padding("Pair", "0", 7, false, None),
            "field `0` of `Pair` is followed by 7 bytes of padding: \
             add a field `[u8; 7]` after it, or put larger fields first"
        );
    }

    #[test]
    fn what_is_not_plain_is_told_the_way_out() {
        assert_eq!(
            not_plain("Person", "name", "String"),
            "field `name` of `Person` is not plain (String): \
             write `#[record(archived)]`, which takes any record as a field"
        );
        assert!(not_plain("A", "a", "usize").ends_with("`u64`, which has one size everywhere"));
        assert!(not_a_struct("Answer").contains("`#[record(archived)]`"));
    }
}
