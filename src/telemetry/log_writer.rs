//! Writes lines to standard error without ever waiting for its reader: a bounded queue, and a thread that
//! writes. A reader that stops reading a pipe, a stopped terminal or a full disk thus stops nothing else.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, ErrorKind, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tracing_subscriber::fmt::MakeWriter;

/// The queue's capacity in bytes.
const CAPACITY: usize = 256 << 10;
/// What each queued line counts in addition to its length, so that empty lines are bounded too.
const LINE_OVERHEAD: usize = 32;
/// How long [`LogWriter::flush`] waits for the reader to take anything, and how long in total.
const STALL_LIMIT: Duration = Duration::from_secs(1);
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// The pause after a write to a non-blocking descriptor that takes nothing now.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Returns the line that reports how many lines were dropped.
type Report = Box<dyn Fn(u64) -> String + Send>;

/// The sending side of the queue. Lines are written in order. A line for which the queue has no room is
/// dropped and counted, and so is one that cannot be written; once lines flow again, a report of their
/// number is written in their place.
#[derive(Clone)]
pub(super) struct LogWriter {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// The queue got an entry.
    filled: Condvar,
    /// The thread has written an entry.
    written: Condvar,
    /// The lines that were dropped since the start.
    dropped: AtomicU64,
}

enum Entry {
    Line(Vec<u8>),
    /// So many lines were dropped here.
    Gap(u64),
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    /// The bytes that the queued lines count.
    bytes: usize,
    /// The lines that were dropped since the last entry.
    skipped: u64,
    /// The entries that the thread has taken, and those that it is done with.
    taken: u64,
    done: u64,
}

impl Queue {
    /// Queues the line. Returns whether there was room. Once a line was dropped, further ones are dropped
    /// until half of the queue is free, so that gaps are few and long.
    fn push(&mut self, line: &[u8]) -> bool {
        let capacity = if self.skipped > 0 { CAPACITY / 2 } else { CAPACITY };
        let size = line.len() + LINE_OVERHEAD;
        if self.bytes + size > capacity {
            self.skipped += 1;
            return false;
        }
        if self.skipped > 0 {
            self.entries.push_back(Entry::Gap(std::mem::take(&mut self.skipped)));
        }
        self.entries.push_back(Entry::Line(line.to_vec()));
        self.bytes += size;
        true
    }

    fn pop(&mut self) -> Option<Entry> {
        let skipped = &mut self.skipped;
        let gap = || Some(Entry::Gap(std::mem::take(skipped))).filter(|gap| !gap.is_empty());
        let entry = self.entries.pop_front().or_else(gap)?;
        if let Entry::Line(line) = &entry {
            self.bytes -= line.len() + LINE_OVERHEAD;
        }
        self.taken += 1;
        Some(entry)
    }

    fn is_written(&self) -> bool {
        self.entries.is_empty() && self.skipped == 0 && self.taken == self.done
    }
}

impl Entry {
    fn is_empty(&self) -> bool {
        matches!(self, Self::Gap(0))
    }
}

impl LogWriter {
    /// Starts the thread, which writes to `sink` as long as the process runs.
    ///
    /// # Errors
    /// When the system refuses to start a thread.
    pub(super) fn start(
        sink: impl Write + Send + 'static,
        report: impl Fn(u64) -> String + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let thread = WriterThread {
            sink,
            report: Box::new(report),
            shared: Arc::clone(&shared),
            unreported: 0,
            torn: false,
        };
        thread::Builder::new().name("log".into()).spawn(|| thread.run())?;
        Ok(Self { shared })
    }

    /// Queues a line, which must end with a line feed, or drops it. Never blocks.
    pub(super) fn line(&self, line: &[u8]) {
        if !self.shared.queue.lock().push(line) {
            self.shared.dropped.fetch_add(1, Relaxed);
        }
        self.shared.filled.notify_one();
    }

    /// Returns how many lines were dropped since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    /// Waits until everything is written, but no longer than the reader takes something within
    /// [`STALL_LIMIT`], and [`FLUSH_LIMIT`] in total.
    pub(super) fn flush(&self) {
        let deadline = Instant::now() + FLUSH_LIMIT;
        let mut queue = self.shared.queue.lock();
        let mut stalled_at = Instant::now() + STALL_LIMIT;
        while !queue.is_written() {
            let done = queue.done;
            if self.shared.written.wait_until(&mut queue, stalled_at.min(deadline)).timed_out() {
                return;
            }
            if queue.done > done {
                stalled_at = Instant::now() + STALL_LIMIT;
            }
        }
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

/// Each call of `write` gets a whole line.
impl Write for &LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogWriter")
    }
}

struct WriterThread<W> {
    sink: W,
    report: Report,
    shared: Arc<Shared>,
    /// The lines that were dropped and not reported yet.
    unreported: u64,
    /// The last line was written in part only.
    torn: bool,
}

impl<W: Write> WriterThread<W> {
    fn run(mut self) {
        loop {
            match self.next() {
                Entry::Gap(lines) => {
                    self.unreported += lines;
                    self.report_gap();
                }
                Entry::Line(line) => {
                    self.report_gap();
                    if self.write_line(&line).is_err() {
                        self.unreported += 1;
                        self.shared.dropped.fetch_add(1, Relaxed);
                    }
                }
            }
            self.shared.queue.lock().done += 1;
            self.shared.written.notify_all();
        }
    }

    fn next(&self) -> Entry {
        let mut queue = self.shared.queue.lock();
        loop {
            if let Some(entry) = queue.pop() {
                return entry;
            }
            self.shared.filled.wait(&mut queue);
        }
    }

    /// Reports the lines that are missing so far. If that fails, the next entry tries again.
    fn report_gap(&mut self) {
        if self.unreported > 0 {
            let report = (self.report)(self.unreported);
            if self.write_line(report.as_bytes()).is_ok() {
                self.unreported = 0;
            }
        }
    }

    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.write_all(b"\n")?;
            self.torn = false;
        }
        self.write_all(line)
    }

    /// Like [`Write::write_all`], but notes whether a part was written, and waits for a descriptor that
    /// somebody has set to non-blocking.
    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let length = bytes.len();
        while !bytes.is_empty() {
            match self.sink.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    bytes = &bytes[written..];
                    self.torn = !bytes.is_empty();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(BUSY_PAUSE),
                Err(error) => return Err(error),
            }
        }
        debug_assert!(length == 0 || !self.torn);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, Sender};

    use super::*;

    /// A sink whose writes each wait for a result, and which sends what was written.
    struct Sink {
        results: Receiver<io::Result<usize>>,
        written: Sender<Vec<u8>>,
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // When the test has dropped its end, everything is taken.
            let length = self.results.recv().unwrap_or(Ok(bytes.len()))?.min(bytes.len());
            let _ = self.written.send(bytes[..length].to_vec());
            Ok(length)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    type Written = Receiver<Vec<u8>>;

    fn writer() -> (LogWriter, Sender<io::Result<usize>>, Written) {
        let (results, to_take) = mpsc::channel();
        let (send, written) = mpsc::channel();
        let sink = Sink { results: to_take, written: send };
        let report = |lines| format!("{lines} dropped\n");
        (LogWriter::start(sink, report).unwrap(), results, written)
    }

    /// Lets the sink take everything, waits for that, and returns what was written.
    fn rest(writer: &LogWriter, results: Sender<io::Result<usize>>, written: &Written) -> String {
        drop(results);
        writer.flush();
        String::from_utf8(written.try_iter().flatten().collect()).unwrap()
    }

    #[test]
    fn lines_are_written_in_order() {
        let (writer, results, written) = writer();
        for n in 0..100 {
            writer.line(format!("{n}\n").as_bytes());
        }
        let expected: String = (0..100).map(|n: u8| n.to_string() + "\n").collect();
        assert_eq!(rest(&writer, results, &written), expected);
        assert_eq!(writer.dropped(), 0);
    }

    #[test]
    fn lines_beyond_the_capacity_are_dropped_and_their_number_takes_their_place() {
        let (writer, results, written) = writer();
        let line = [&[b'x'; 1000][..], b"\n"].concat();
        let sent: u64 = 1000;
        for _ in 0..sent {
            writer.line(&line);
        }
        let dropped = writer.dropped();
        assert!((700..800).contains(&dropped), "{dropped}");
        // The next lines are dropped too, until half of the queue is free.
        for _ in 0..100 {
            results.send(Ok(usize::MAX)).unwrap();
            written.recv().unwrap();
        }
        writer.line(b"too early\n");
        assert_eq!(writer.dropped(), dropped + 1);
        for _ in 0..100 {
            results.send(Ok(usize::MAX)).unwrap();
            written.recv().unwrap();
        }
        writer.line(b"after\n");
        let text = rest(&writer, results, &written);
        assert!(text.ends_with(&format!("x\n{} dropped\nafter\n", dropped + 1)), "{text}");
        assert_eq!(writer.dropped(), dropped + 1);
    }

    #[test]
    fn dropped_lines_are_reported_even_if_no_other_line_follows() {
        let (writer, results, written) = writer();
        writer.line(&vec![b'x'; CAPACITY]);
        assert_eq!(rest(&writer, results, &written), "1 dropped\n");
        assert_eq!(writer.dropped(), 1);
    }

    #[test]
    fn lines_that_cannot_be_written_count_as_dropped_and_are_reported_later() {
        let (writer, results, written) = writer();
        let full = || Err(ErrorKind::StorageFull.into());
        // The first line is written in part; the second one fails, and before it the report of the first.
        for result in [Ok(3), full(), full(), full()] {
            results.send(result).unwrap();
        }
        for line in ["first\n", "second\n", "third\n"] {
            writer.line(line.as_bytes());
        }
        assert_eq!(rest(&writer, results, &written), "fir\n2 dropped\nthird\n");
        assert_eq!(writer.dropped(), 2);
    }

    #[test]
    fn a_descriptor_that_is_busy_or_interrupted_is_tried_again() {
        let (writer, results, written) = writer();
        for kind in [ErrorKind::WouldBlock, ErrorKind::Interrupted, ErrorKind::WouldBlock] {
            results.send(Err(kind.into())).unwrap();
        }
        writer.line(b"line\n");
        assert_eq!(rest(&writer, results, &written), "line\n");
        assert_eq!(writer.dropped(), 0);
    }

    #[test]
    fn a_flush_gives_up_on_a_reader_that_takes_nothing() {
        let (writer, results, _written) = writer();
        writer.line(b"line\n");
        writer.flush();
        assert_eq!(writer.shared.queue.lock().done, 0);
        drop(results);
    }
}
