//! The SQL statement that `account seal` prints, for an admin to run with another program.

use crate::domain::account::{AccountName, ClientId};

/// Returns the statement that registers an account with its sealed secret.
pub(super) fn insert_account(
    name: &AccountName,
    client_id: &ClientId,
    sealed_secret: &str,
    description: &str,
) -> String {
    format!(
        "INSERT INTO accounts (name, client_id, client_secret, description)\n\
         VALUES ({}, {}, {}, {});",
        quote(name.as_str()),
        quote(client_id.as_str()),
        quote(sealed_secret),
        quote(description),
    )
}

/// Returns `text` as a string literal that does not depend on `standard_conforming_strings`.
fn quote(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    if text.contains('\\') {
        return format!("E'{}'", doubled.replace('\\', "\\\\"));
    }
    format!("'{doubled}'")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quotes_and_backslashes_stay_inside_the_literal() {
        assert_eq!(quote("acme"), "'acme'");
        assert_eq!(
            quote("o'neil'); drop table accounts; --"),
            "'o''neil''); drop table accounts; --'"
        );
        assert_eq!(quote(r"\'"), r"E'\\'''");
    }

    /// Parses a literal as Postgres does. Returns `None` if the literal ends before the text does.
    fn unquote(literal: &str) -> Option<String> {
        let (body, escapes) = match literal.strip_prefix('E') {
            Some(body) => (body, true),
            None => (literal, false),
        };
        let mut rest = body.strip_prefix('\'')?.strip_suffix('\'')?.chars();
        let mut text = String::new();
        while let Some(c) = rest.next() {
            match c {
                '\'' if rest.next() != Some('\'') => return None,
                '\\' if escapes && rest.next() != Some('\\') => return None,
                c => text.push(c),
            }
        }
        Some(text)
    }

    proptest! {
        #[test]
        fn a_quoted_text_is_parsed_back_to_itself(text in r"[a-z'\\\n]{0,12}|\PC*") {
            prop_assert_eq!(unquote(&quote(&text)), Some(text));
        }
    }
}
