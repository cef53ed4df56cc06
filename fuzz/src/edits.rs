//! Changes of a genuine value: nearly all bytes at random are no value at all, and say little.

/// Changes `value` as `edits` say, four bytes each: what is done, where, and with which byte.
pub(crate) fn apply(value: &mut Vec<u8>, edits: &[u8]) {
    for edit in edits.chunks_exact(4) {
        let place = usize::from(u16::from_le_bytes([edit[1], edit[2]]));
        let byte = edit[3];
        match edit[0] % 4 {
            0 => value.truncate(place),
            1 if place <= value.len() => value.insert(place, byte),
            2 if place < value.len() => drop(value.remove(place)),
            _ => {
                if let Some(changed) = value.get_mut(place) {
                    *changed ^= byte;
                }
            }
        }
    }
}
