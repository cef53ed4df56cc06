//! Reads JSON lines: an object on each line, whose keys are the columns.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use zeroize::Zeroizing;

use super::{
    columns::{self, Column, Content, Kind, Row},
    fault::{Fault, RowFaults},
};

/// Reads rows with `columns`.
///
/// # Errors
/// When the text is an array, as other commands print it.
pub(super) fn read(text: &str, columns: &'static [Column]) -> Result<Content, Fault> {
    if text.trim_start().starts_with('[') {
        return Err(Fault::of_line(
            1,
            "it is an array: write each of its objects on a line, as `jq -c '.[]'` does",
        ));
    }
    let mut content = Content::default();
    for (at, text) in text.lines().enumerate() {
        if text.trim().is_empty() {
            continue;
        }
        match row(at + 1, text, columns) {
            Ok(row) => content.rows.push(row),
            Err(faults) => content.faults.extend(faults),
        }
    }
    Ok(content)
}

fn row(line: usize, text: &str, columns: &'static [Column]) -> Result<Row, Vec<Fault>> {
    // The text of the parser's error may quote the line.
    let object: Object = serde_json::from_str(text).map_err(|error| {
        let text = format!("it is not one JSON object, because of byte {}", error.column());
        vec![Fault::of_line(line, text)]
    })?;
    let mut faults = RowFaults::new(line);
    let mut unknown = Vec::new();
    let mut cells: Vec<Option<Zeroizing<String>>> = columns.iter().map(|_| None).collect();
    let mut given = vec![false; columns.len()];
    for (at, (key, value)) in object.0.into_iter().enumerate() {
        let Some(column) = columns.iter().position(|column| column.name == key.as_str()) else {
            let text = format!("key {} is unknown: there are {}", at + 1, columns::names(columns));
            unknown.push(Fault::of_line(line, text));
            continue;
        };
        let Column { name, kind, .. } = columns[column];
        if std::mem::replace(&mut given[column], true) {
            faults.add(name, "it is there twice");
        }
        match cell(kind, value) {
            Ok(cell) => cells[column] = cell,
            Err(fault) => faults.add(name, fault),
        }
    }
    let faults = [unknown, faults.into_faults()].concat();
    if faults.is_empty() { Ok(Row { line, cells }) } else { Err(faults) }
}

/// Returns the value as CSV writes it.
fn cell(kind: Kind, value: Value) -> Result<Option<Zeroizing<String>>, &'static str> {
    let text = match (kind, value) {
        (Kind::Number, Value::Null) => Zeroizing::default(),
        (_, Value::Null) => return Ok(None),
        (_, Value::Text(text)) => text,
        (Kind::Flag, Value::Flag(flag)) => Zeroizing::new(flag.to_string()),
        (Kind::Number, Value::Number(number)) => Zeroizing::new(number.to_string()),
        (Kind::List, Value::List(words)) => {
            if words.iter().any(|word| word.is_empty() || word.contains(char::is_whitespace)) {
                return Err("each text of the list must be one word");
            }
            let words: Vec<&str> = words.iter().map(|word| word.as_str()).collect();
            Zeroizing::new(words.join(" "))
        }
        (Kind::Text, _) => return Err("it must be a text"),
        (Kind::Flag, _) => return Err("it must be true or false"),
        (Kind::Number, _) => return Err("it must be a whole number"),
        (Kind::List, _) => return Err("it must be a list of texts"),
    };
    Ok(Some(text))
}

/// The keys and values of an object, in their order, also those that are there twice.
struct Object(Vec<(Zeroizing<String>, Value)>);

enum Value {
    Null,
    Flag(bool),
    Number(i64),
    Text(Zeroizing<String>),
    List(Vec<Zeroizing<String>>),
    /// Anything else. No column takes it.
    Other,
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut entries = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    entries.push((Zeroizing::new(key), value));
                }
                Ok(Object(entries))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
                Ok(Value::Flag(flag))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
                Ok(Value::Number(number))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
                Ok(i64::try_from(number).map_or(Value::Other, Value::Number))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                Ok(Value::Text(Zeroizing::new(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut texts = Some(Vec::new());
                while let Some(value) = list.next_element()? {
                    match (value, &mut texts) {
                        (Value::Text(text), Some(texts)) => texts.push(text),
                        _ => texts = None,
                    }
                }
                Ok(texts.map_or(Value::Other, Value::List))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Value::Other)
            }
        }
        deserializer.deserialize_any(Any)
    }
}
