//! Input from the user: API KEYs and confirmations.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    path::Path,
};

use anyhow::{Context, bail};
use zeroize::Zeroizing;

use crate::{
    domain::secret::ClientSecret,
    files::{given_path::shown, text},
};

/// How many bytes are read at most. No API KEY is that long.
const MAX_SECRET_BYTES: usize = 4096;

/// Reads an API KEY from `file` if it is given, and otherwise from standard input. If that is a terminal,
/// prints a prompt that names `owner`, and turns off the echo. Blocks until the API KEY has been read.
pub(super) fn client_secret(file: Option<&Path>, owner: &str) -> anyhow::Result<ClientSecret> {
    let text = match file {
        Some(path) => File::open(path)
            .and_then(read)
            .with_context(|| format!("cannot read {}", shown(path)))?,
        None if io::stdin().is_terminal() => {
            Zeroizing::new(rpassword::prompt_password(format!("API KEY of {owner}: "))?)
        }
        None => read(io::stdin().lock()).context("cannot read the secret from standard input")?,
    };
    Ok(ClientSecret::new(&text)?)
}

fn read(from: impl Read) -> io::Result<Zeroizing<String>> {
    let mut bytes = Vec::with_capacity(MAX_SECRET_BYTES);
    from.take(MAX_SECRET_BYTES as u64).read_to_end(&mut bytes)?;
    Ok(text::decode(bytes)?)
}

/// Asks the user to confirm the removal of `what` by typing its name, unless `yes` is set.
///
/// # Errors
/// When the user types another name, or standard input is not a terminal.
pub(super) fn confirm_removal(what: &str, name: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        bail!("removing {what} {name} cannot be undone: say --yes");
    }
    write!(io::stderr().lock(), "This cannot be undone. Type the name of the {what} to remove: ")?;
    let mut typed = String::new();
    io::stdin().read_line(&mut typed)?;
    if typed.trim() != name {
        bail!("nothing was removed");
    }
    Ok(())
}
