//! Searches what drivers print for tokens and bearers.

use std::collections::BTreeSet;

/// What the tokens of the simulator begin with, and what bearers begin with. A text that has any of them followed by
/// letters or digits shows at least a part of a secret, also of one that the runner has never seen.
const BEGINNINGS: [&str; 2] = ["eyJ", "tbk_"];
/// How many characters after the beginning make it a secret and no mention of the form, such as `tbk_…`.
const ENOUGH: usize = 6;
/// The length of the parts of which none may be printed.
const PART: usize = 16;

/// The tokens and bearers that have existed in a scenario.
#[derive(Default)]
pub(crate) struct Secrets(BTreeSet<String>);

impl Secrets {
    pub(crate) fn add(&mut self, secret: &str) {
        self.0.insert(secret.to_owned());
    }

    /// Returns the first line of `text` that contains a secret or the end of one, with what it contains made
    /// unreadable.
    pub(crate) fn find_in(&self, text: &str) -> Option<String> {
        let line = text.lines().find(|line| self.is_in(line))?;
        let mut shown = line.to_owned();
        for secret in &self.0 {
            shown = shown
                .replace(secret.as_str(), "<secret>")
                .replace(end(secret), "<end of a secret>");
        }
        Some(shown.chars().take(300).collect())
    }

    fn is_in(&self, line: &str) -> bool {
        self.0.iter().any(|secret| line.contains(end(secret)))
            || BEGINNINGS.iter().any(|beginning| has_secret(line, beginning))
    }
}

/// The last characters of a secret. Those of a token are its signature, and those of a bearer are random.
fn end(secret: &str) -> &str {
    secret.split_at_checked(secret.len().saturating_sub(PART)).map_or(secret, |(_, end)| end)
}

fn has_secret(line: &str, beginning: &str) -> bool {
    line.match_indices(beginning).any(|(at, _)| {
        let rest = &line[at + beginning.len()..];
        rest.chars().take_while(char::is_ascii_alphanumeric).count() >= ENOUGH
    })
}
