//! What is asked of the one who runs this.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    path::Path,
};

use anyhow::{Context, bail};
use zeroize::Zeroizing;

use crate::domain::secret::ClientSecret;

/// More than any secret has: what is longer is another file.
const LONGEST: u64 = 4096;

/// Takes an API KEY from `file`; else, hidden, from the terminal; else from standard input.
pub(super) fn client_secret(file: Option<&Path>, of: &str) -> anyhow::Result<ClientSecret> {
    let text = match file {
        Some(path) => File::open(path)
            .and_then(read)
            .with_context(|| format!("cannot read {}", path.display()))?,
        None if io::stdin().is_terminal() => {
            Zeroizing::new(rpassword::prompt_password(format!("API KEY of {of}: "))?)
        }
        None => read(io::stdin().lock()).context("cannot read the secret from standard input")?,
    };
    Ok(ClientSecret::new(&text)?)
}

fn read(from: impl Read) -> io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(64));
    from.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

/// Has the removal of `what` confirmed by its name, unless `yes` did so.
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
