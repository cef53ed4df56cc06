//! The last batches of this start's chain that are not delivered yet, in memory. If somebody truncates a segment,
//! its records are written again from here.

use std::collections::VecDeque;

use crate::audit::chain::ChainHead;

/// A batch as it was written to a segment.
struct Batch {
    /// The chain's head before the batch.
    before: ChainHead,
    /// `seq` of its last record.
    last_seq: i64,
    /// Its lines, each with a line feed.
    lines: Vec<u8>,
}

/// Batches in order and without gaps. Beyond the limit, the oldest are given up.
pub(super) struct RecentBatches {
    batches: VecDeque<Batch>,
    bytes: usize,
    max_bytes: usize,
}

impl RecentBatches {
    /// Returns an empty memory for `max_bytes` bytes.
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { batches: VecDeque::new(), bytes: 0, max_bytes }
    }

    /// Adds the batch of the records after `before` up to `last_seq`.
    pub(super) fn push(&mut self, before: ChainHead, last_seq: i64, lines: Vec<u8>) {
        self.bytes += lines.capacity();
        self.batches.push_back(Batch { before, last_seq, lines });
        while self.bytes > self.max_bytes {
            self.drop_oldest();
        }
    }

    /// Drops the batches whose records are all delivered.
    pub(super) fn mark_delivered(&mut self, seq: i64) {
        while self.batches.front().is_some_and(|batch| batch.last_seq <= seq) {
            self.drop_oldest();
        }
    }

    /// Returns the number before the first record that is remembered; `None` if there is none.
    pub(super) fn begins_after(&self) -> Option<i64> {
        self.batches.front().map(|batch| batch.before.seq)
    }

    fn drop_oldest(&mut self) {
        if let Some(batch) = self.batches.pop_front() {
            self.bytes -= batch.lines.capacity();
        }
    }

    /// Returns the lines of the batches that begin after record `after` or later and end with record `last_seq` or
    /// earlier, and the head before them; `None` if there are none, or if they do not reach `last_seq`. A batch
    /// lies within one segment, so that this selects whole batches of a segment.
    pub(super) fn lines(&self, after: i64, last_seq: i64) -> Option<(ChainHead, Vec<u8>)> {
        let within = |batch: &&Batch| batch.before.seq >= after && batch.last_seq <= last_seq;
        let mut selected = self.batches.iter().filter(within).peekable();
        let before = selected.peek()?.before;
        let (mut lines, mut end) = (Vec::new(), before.seq);
        for batch in selected {
            lines.extend_from_slice(&batch.lines);
            end = batch.last_seq;
        }
        (end == last_seq).then_some((before, lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::chain::Digest;

    fn head(seq: i64) -> ChainHead {
        ChainHead { seq, hash: Digest([u8::try_from(seq).unwrap(); 32]) }
    }

    fn filled(max_bytes: usize) -> RecentBatches {
        let mut recent = RecentBatches::new(max_bytes);
        recent.push(head(0), 2, b"1\n2\n".to_vec());
        recent.push(head(2), 3, b"3\n".to_vec());
        recent.push(head(3), 5, b"4\n5\n".to_vec());
        recent
    }

    #[test]
    fn the_batches_of_a_segment_are_found_with_the_head_before_them() {
        let recent = filled(1_000);
        assert_eq!(recent.lines(0, 5), Some((head(0), b"1\n2\n3\n4\n5\n".to_vec())));
        assert_eq!(recent.lines(0, 3), Some((head(0), b"1\n2\n3\n".to_vec())));
        assert_eq!(recent.lines(2, 5), Some((head(2), b"3\n4\n5\n".to_vec())));
        assert_eq!(recent.lines(5, 7), None, "they are not written yet");
        assert_eq!(recent.lines(0, 7), None);
    }

    #[test]
    fn delivered_batches_are_dropped_and_beyond_the_limit_the_oldest() {
        let mut recent = filled(1_000);
        recent.mark_delivered(2);
        assert_eq!(recent.lines(0, 5), Some((head(2), b"3\n4\n5\n".to_vec())));
        recent.mark_delivered(4);
        assert_eq!(
            recent.lines(0, 5),
            Some((head(3), b"4\n5\n".to_vec())),
            "the last one is partly"
        );
        recent.mark_delivered(5);
        assert_eq!((recent.lines(0, 5), recent.bytes), (None, 0));
        assert_eq!(filled(6).lines(0, 5), Some((head(2), b"3\n4\n5\n".to_vec())));
        assert_eq!(filled(3).lines(0, 5), None);
    }
}
