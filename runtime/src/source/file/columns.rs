//! Whether a header has the columns that a type needs, asked of the type alone: where one is
//! missing, every line of the file would be refused.
//!
//! A type says what it misses only of a whole record, so it is given one: the columns of the
//! header, each with a value of whatever kind is asked for. A type that does not take such a value
//! (a date, a list of names) leaves the question open; the first records of the file answer it.
//!
//! Called by `csv` when it is given a header.

use csv::StringRecord;
use serde::de::value::MapDeserializer;
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

/// The field that `T` needs and no column has, if that can be told.
pub fn missing<T: DeserializeOwned>(header: &StringRecord) -> Option<&'static str> {
    let record = MapDeserializer::new(header.iter().map(|name| (name, Anything)));
    match T::deserialize(record) {
        Err(Verdict::Missing(field)) => Some(field),
        Ok(_) | Err(Verdict::Open) => None,
    }
}

/// What a type has against a record.
#[derive(Debug)]
enum Verdict {
    Missing(&'static str),
    Open,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for Verdict {}

impl serde::de::Error for Verdict {
    fn custom<T: std::fmt::Display>(_: T) -> Self {
        Self::Open
    }

    fn missing_field(field: &'static str) -> Self {
        Self::Missing(field)
    }
}

/// A value of the kind that is asked for.
struct Anything;

impl IntoDeserializer<'_, Verdict> for Anything {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! values {
    ($($ask:ident $give:ident)*) => {$(
        fn $ask<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Verdict> {
            visitor.$give(Default::default())
        }
    )*};
}

impl<'de> Deserializer<'de> for Anything {
    type Error = Verdict;

    values! {
        deserialize_bool visit_bool
        deserialize_i8 visit_i8 deserialize_i16 visit_i16 deserialize_i32 visit_i32
        deserialize_i64 visit_i64 deserialize_i128 visit_i128
        deserialize_u8 visit_u8 deserialize_u16 visit_u16 deserialize_u32 visit_u32
        deserialize_u64 visit_u64 deserialize_u128 visit_u128
        deserialize_f32 visit_f32 deserialize_f64 visit_f64
        deserialize_char visit_char
        deserialize_any visit_borrowed_str
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Verdict> {
        visitor.visit_borrowed_bytes(&[])
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Verdict> {
        visitor.visit_none()
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Verdict> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Verdict> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        str string byte_buf unit_struct seq tuple tuple_struct map struct enum identifier
        ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its fields' names and types matter")]
    struct Row {
        id: u64,
        #[serde(rename = "Name")]
        name: String,
        share: Option<f64>,
        #[serde(default)]
        rest: [u8; 3],
        letter: char,
        is_new: bool,
    }

    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Wrapped(#[expect(dead_code, reason = "as above")] Row);

    #[derive(Deserialize)]
    struct Tuple(#[expect(dead_code, reason = "as above")] Row);

    #[derive(Deserialize)]
    enum Kind {
        Large,
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "as above")]
    struct Kinds {
        kind: Kind,
        id: u64,
    }

    fn header(line: &str) -> StringRecord {
        line.split(',').collect()
    }

    #[test]
    fn what_a_type_needs_is_missed() {
        for (line, wanted) in [
            ("id,Name,letter,is_new", None),
            ("is_new,x,,Name,letter,y,id,share", None),
            ("", Some("id")),
            ("\0\u{1}", Some("id")),
            ("id,name,letter,is_new", Some("Name")),
            ("id,Name,letter", Some("is_new")),
        ] {
            assert_eq!(missing::<Row>(&header(line)), wanted, "{line}");
            assert_eq!(missing::<Wrapped>(&header(line)), wanted, "{line}");
        }
    }

    #[test]
    fn what_cannot_be_told_is_left_open() {
        // No value of this type is made from nothing.
        assert_eq!(missing::<Kinds>(&header("kind,x")), None);
        assert_eq!(missing::<Kinds>(&header("x")), Some("kind"));
        assert_eq!(missing::<Tuple>(&header("x")), None);
        assert_eq!(missing::<(u64, String)>(&header("a,b")), None);
        assert_eq!(missing::<u64>(&header("a")), None);
    }
}
