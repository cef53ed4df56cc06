//! Reads the body of an answer into the fields that matter.
//!
//! A document that is wrapped into a string or a list is taken out of it. What is left is read strictly: one whole
//! JSON object.

use std::fmt;

use http::HeaderMap;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use super::{
    body::{Unreadable, document, text_of},
    json::{is_blank, repair_escapes},
    stated_error::{ErrorFields, StatedError, code_anywhere},
};

/// The most levels of strings and lists around a document that are removed.
const MOST_WRAPPINGS: usize = 4;

/// The fields of an answer.
pub(super) struct Answer {
    /// The JSON value of each `accessToken` that says something.
    pub(super) access_tokens: Vec<Zeroizing<String>>,
    /// The JSON value of each `expiresIn` that says something.
    pub(super) ends: Vec<String>,
    /// The error that the answer states.
    pub(super) error: Option<StatedError>,
}

/// Reads an answer's body.
///
/// # Errors
/// [`Unreadable`] if it is not one whole JSON object, also after everything around it is undone.
pub(super) fn read(headers: &HeaderMap, body: &[u8]) -> Result<Answer, Unreadable> {
    let (text, unknown_coding) = text_of(headers, body)?;
    let not_read = unknown_coding.map_or(Unreadable::NotJson, Unreadable::Coding);
    read_document(&text, MOST_WRAPPINGS).ok_or(not_read)
}

/// Reads a document: an object, a string that holds a document, or a list in which one value says something.
fn read_document(text: &str, wrappings: usize) -> Option<Answer> {
    let text = repair_escapes(document(text));
    if text.starts_with('{') {
        return read_object(&text);
    }
    let wrappings = wrappings.checked_sub(1)?;
    if text.starts_with('"') {
        let inner = Zeroizing::new(serde_json::from_str::<String>(&text).ok()?);
        return read_document(&inner, wrappings);
    }
    let values: Vec<&RawValue> = serde_json::from_str(&text).ok()?;
    let mut values = values
        .into_iter()
        .filter(|value| value.get().starts_with(['{', '[', '"']) && !is_blank(value));
    let (inner, None) = (values.next()?, values.next()) else { return None };
    read_document(inner.get(), wrappings)
}

/// Returns the JSON values of a field that say something.
fn given(fields: Vec<&RawValue>) -> impl Iterator<Item = String> {
    fields.into_iter().filter(|value| !is_blank(value)).map(|value| value.get().to_owned())
}

fn read_object(text: &str) -> Option<Answer> {
    let fields: Fields<'_> = serde_json::from_str(text).ok()?;
    let access_tokens: Vec<_> = given(fields.access_tokens).map(Zeroizing::new).collect();
    let mut error = StatedError::of(&fields.error);
    if access_tokens.is_empty() || error.is_some() {
        let has_code = error.as_ref().is_some_and(|error| error.code.is_some());
        if let Some(code) = (!has_code).then(|| code_anywhere(text)).flatten() {
            error.get_or_insert_default().code = Some(code);
        }
    }
    Some(Answer { access_tokens, ends: given(fields.ends).collect(), error })
}

/// The fields of the object as they are written: all of each name, since writers repeat fields.
#[derive(Default)]
struct Fields<'a> {
    access_tokens: Vec<&'a RawValue>,
    ends: Vec<&'a RawValue>,
    error: ErrorFields<'a>,
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields::default();
        while let Some(name) = map.next_key::<String>()? {
            let field = match name.as_str() {
                "accessToken" => &mut fields.access_tokens,
                "expiresIn" => &mut fields.ends,
                "error" | "errors" => &mut fields.error.errors,
                "code" => &mut fields.error.codes,
                "status" => &mut fields.error.statuses,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            field.push(map.next_value()?);
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests;
