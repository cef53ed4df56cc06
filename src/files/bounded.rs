//! Reading of files that people name in settings and flags, bounded in size and in time. A name may lead to a device
//! without an end, a named pipe without a writer, or a file that is far too large; a start must say so, and not wait.
//!
//! The functions block until then. What they cannot bound is a read of an ordinary file whose disk or server never
//! answers: the system does not interrupt it.

use std::{
    fs::{File, OpenOptions},
    io::{self, IsTerminal},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
};
use zeroize::Zeroizing;

/// The most that is read of a file, and the longest wait for it. Nobody is waited for longer than that, except for
/// whoever types at a terminal.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Number of bytes.
    pub bytes: usize,
    /// Time until the end of the file is reached.
    pub wait: Duration,
}

/// The limits of a file that a setting or flag names. The largest such files are revocation lists.
pub const FILE: Limits = Limits { bytes: 32 << 20, wait: Duration::from_secs(5) };

/// How many bytes are read at once.
const CHUNK: usize = 64 << 10;

/// Opens the file at `path` for [`read_from`]. Does not wait for the writer of a named pipe.
///
/// # Errors
/// Those of the file system.
pub fn open(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Reads the file at `path` to its end, within [`FILE`].
///
/// # Errors
/// Like [`read_from`].
pub fn read(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    read_from(&open(path)?, FILE)
}

/// Reads `file` to its end.
///
/// # Errors
/// [`io::ErrorKind::FileTooLarge`] and [`io::ErrorKind::TimedOut`] at the limits; otherwise those of the file system,
/// also for a directory.
pub fn read_from(file: &impl AsFd, limits: Limits) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = file.as_fd();
    let end = (!file.is_terminal()).then(|| Instant::now() + limits.wait);
    let mut content = Zeroizing::new(Vec::with_capacity(CHUNK.min(limits.bytes)));
    let mut chunk = Zeroizing::new(vec![0; CHUNK]);
    loop {
        if !is_readable_by(file, end)? {
            let waited = humantime::format_duration(limits.wait);
            let text = format!("its end did not come within {waited}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        let read = match rustix::io::read(file, &mut **chunk) {
            Ok(0) => return Ok(content),
            Ok(read) => read,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(error) => return Err(error.into()),
        };
        if content.len() + read > limits.bytes {
            let text = format!("it is larger than {} KiB", limits.bytes >> 10);
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        append(&mut content, &chunk[..read]);
    }
}

/// Returns whether a read of the file at `path` by a library, which sets no limits, may never come to its end. Blocks.
#[must_use]
pub fn may_never_end(path: &Path) -> bool {
    let Ok(found) = path.metadata() else { return false };
    let kind = found.file_type();
    let is_device = kind.is_char_device() || kind.is_block_device();
    kind.is_fifo() || is_device && path != Path::new("/dev/null")
}

/// Waits until `file` can be read, or has ended. Returns whether that was before `end`.
fn is_readable_by(file: BorrowedFd<'_>, end: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        // A named pipe that never had a writer is not readable, though a read would find its end.
        match poll(&mut [PollFd::from_borrowed_fd(file, PollFlags::IN)], left.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Appends to what may be a secret: growing in place would leave copies of it behind in memory.
fn append(content: &mut Zeroizing<Vec<u8>>, more: &[u8]) {
    let len = content.len() + more.len();
    if len > content.capacity() {
        let mut larger = Zeroizing::new(Vec::with_capacity(len.max(2 * content.len())));
        larger.extend_from_slice(content);
        *content = larger;
    }
    content.extend_from_slice(more);
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, os::unix::net::UnixListener, process::Command, thread};

    use super::*;

    const LIMITS: Limits = Limits { bytes: 1 << 20, wait: Duration::from_millis(50) };

    fn fault(path: &Path) -> io::ErrorKind {
        let read = open(path).and_then(|file| read_from(&file, LIMITS));
        read.map(|_| ()).expect_err(&path.display().to_string()).kind()
    }

    fn named_pipe(path: &Path) {
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    #[test]
    fn what_has_no_end_or_never_answers_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        assert_eq!(fault(Path::new("/dev/zero")), io::ErrorKind::FileTooLarge);
        assert_eq!(fault(Path::new("/dev/full")), io::ErrorKind::FileTooLarge);
        assert_eq!(fault(Path::new("/dev/urandom")), io::ErrorKind::FileTooLarge);
        assert_eq!(fault(directory.path()), io::ErrorKind::IsADirectory);
        File::create(at("sparse")).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(fault(&at("sparse")), io::ErrorKind::FileTooLarge);
        named_pipe(&at("pipe"));
        assert_eq!(fault(&at("pipe")), io::ErrorKind::TimedOut, "no writer");
        let mut options = OpenOptions::new();
        let mut writer = options.read(true).write(true).open(at("pipe")).unwrap();
        assert_eq!(fault(&at("pipe")), io::ErrorKind::TimedOut, "a writer that writes nothing");
        writer.write_all(b"a part").unwrap();
        assert_eq!(fault(&at("pipe")), io::ErrorKind::TimedOut, "a writer that does not end");
        let _listener = UnixListener::bind(at("socket")).unwrap();
        open(&at("socket")).unwrap_err();
        assert_eq!(fault(&at("nothing")), io::ErrorKind::NotFound);
        for (path, may) in [("/dev/zero", true), ("/dev/null", false), ("/etc/passwd", false)] {
            assert_eq!(may_never_end(Path::new(path)), may, "{path}");
        }
        assert!(may_never_end(&at("pipe")) && !may_never_end(&at("nothing")));
    }

    #[test]
    fn what_has_an_end_is_read_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let long: Vec<u8> = (0..=255).cycle().take(300_000).collect();
        for content in [&b""[..], b"short", &long, &long[..CHUNK], &vec![7; 1 << 20]] {
            fs::write(at("file"), content).unwrap();
            assert_eq!(*read_from(&open(&at("file")).unwrap(), LIMITS).unwrap(), content);
        }
        assert!(read(Path::new("/dev/null")).unwrap().is_empty());
        named_pipe(&at("pipe"));
        let (path, sent) = (at("pipe"), long.clone());
        let writer = thread::spawn(move || {
            let mut pipe = OpenOptions::new().write(true).open(path).unwrap();
            sent.chunks(70_000).for_each(|part| pipe.write_all(part).unwrap());
        });
        assert_eq!(*read(&at("pipe")).unwrap(), long);
        writer.join().unwrap();
    }
}
