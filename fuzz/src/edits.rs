//! Changes to a valid value. Random bytes alone would hardly ever be close to a valid one.

/// Applies `edits` to `value`. Each edit has four bytes: the operation, the position (two bytes), and
/// the byte to insert or to XOR.
pub(crate) fn apply(value: &mut Vec<u8>, edits: &[u8]) {
    for edit in edits.chunks_exact(4) {
        let position = usize::from(u16::from_le_bytes([edit[1], edit[2]]));
        let byte = edit[3];
        match edit[0] % 4 {
            0 => value.truncate(position),
            1 if position <= value.len() => value.insert(position, byte),
            2 if position < value.len() => drop(value.remove(position)),
            _ => {
                if let Some(changed) = value.get_mut(position) {
                    *changed ^= byte;
                }
            }
        }
    }
}
