//! A log whose lines show only printable characters, whatever texts from elsewhere they quote.

use std::io::{self, Write};

use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

use crate::domain::printable::{printable, printable_json};

/// The format of log lines.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogFormat {
    /// Text for people.
    Pretty,
    /// One JSON object on each line.
    Json,
}

/// Makes writers that escape what is not printable. Each call of their `write` gets a whole line.
pub(super) struct PrintableLines<M> {
    pub(super) inner: M,
    pub(super) format: LogFormat,
}

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for PrintableLines<M> {
    type Writer = PrintableLine<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        PrintableLine { inner: self.inner.make_writer(), format: self.format }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        PrintableLine { inner: self.inner.make_writer_for(meta), format: self.format }
    }
}

pub(super) struct PrintableLine<W> {
    inner: W,
    format: LogFormat,
}

impl<W: Write> Write for PrintableLine<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let shown = shown(text.strip_suffix('\n').unwrap_or(&text), self.format);
        self.inner.write_all(format!("{shown}\n").as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn shown(line: &str, format: LogFormat) -> String {
    match format {
        LogFormat::Json => printable_json(line).into_owned(),
        // `tracing_subscriber` escapes this character in what it quotes. Here it colours the line.
        LogFormat::Pretty => line.split('\u{1b}').map(printable).collect::<Vec<_>>().join("\u{1b}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_one_line_with_its_colours() {
        for (format, line, expected) in [
            (
                LogFormat::Pretty,
                "\u{1b}[2mINFO\u{1b}[0m a\nWARN b\r\u{202e}",
                "\u{1b}[2mINFO\u{1b}[0m a\\u{a}WARN b\\u{d}\\u{202e}\n",
            ),
            (
                LogFormat::Json,
                "{\"error\":\"a\\n\u{9b}\u{202e}\"}",
                "{\"error\":\"a\\n\\u009b\\u202e\"}\n",
            ),
        ] {
            let mut written = Vec::new();
            let mut writer = PrintableLine { inner: &mut written, format };
            writer.write_all(format!("{line}\n").as_bytes()).unwrap();
            assert_eq!(String::from_utf8(written).unwrap(), expected);
        }
    }
}
