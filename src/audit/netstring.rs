//! Netstrings, the encoding of everything that is hashed or signed.
//!
//! A netstring is the length in bytes as a decimal number, `:`, the bytes, `,`. An absent value is the
//! single byte `-`, which no netstring begins with, so that different values never have the same
//! encoding. `docs/audit-format.md` describes this for other implementations.

use std::{fmt, io::Write};

/// Appends `value` as a netstring.
pub(super) fn push_text(out: &mut Vec<u8>, value: impl AsRef<[u8]>) {
    let value = value.as_ref();
    push_decimal(out, value.len());
    out.push(b':');
    out.extend_from_slice(value);
    out.push(b',');
}

/// Appends the netstring of the decimal digits of `number`, with `-` before a negative one.
pub(super) fn push_integer(out: &mut Vec<u8>, number: i64) {
    // The longest is i64::MIN, of 20 characters.
    let mut text = Vec::with_capacity(20);
    push_decimal(&mut text, number);
    push_text(out, text);
}

/// Appends `value` as a netstring; `-` if it is absent.
pub(super) fn push_optional_text(out: &mut Vec<u8>, value: Option<&str>) {
    match value {
        Some(value) => push_text(out, value),
        None => out.push(b'-'),
    }
}

/// Appends `value` as [`push_integer`] does; `-` if it is absent.
pub(super) fn push_optional_integer(out: &mut Vec<u8>, value: Option<i64>) {
    match value {
        Some(value) => push_integer(out, value),
        None => out.push(b'-'),
    }
}

fn push_decimal(out: &mut Vec<u8>, number: impl fmt::Display) {
    write!(out, "{number}").expect("writing to a Vec cannot fail");
}
