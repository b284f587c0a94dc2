//! What an earlier supervisor had noted of bytes between a pipe and a ring: what is missing is
//! done, what was not begun is forgotten.
//!
//! Called by `console` before it takes its ends of the rings.

#![expect(unsafe_code, reason = "reads and writes the positions of rings that nobody else has")]

use super::gate::{Gate, Words};
use testudo_shm::primitive::{AtomicU64, Ordering};
use testudo_shm::ring::RingParts;

/// A published position.
fn position(word: std::ptr::NonNull<AtomicU64>) -> u64 {
    // SAFETY: the words of a job's rings are mapped for as long as the process.
    unsafe { word.as_ref() }.load(Ordering::Acquire)
}

/// Settles what was being handed over to the first of the rings, and to the next one to be ended.
pub(super) fn input(gate: &mut Gate, words: &Words, rings: &[(RingParts, usize)]) {
    let taken = Words::get(&words.taken);
    let is_there =
        rings.first().is_some_and(|(ring, _)| position(ring.tail) == Words::get(&words.tail));
    if taken > 0 && is_there {
        let gone = Words::get(&words.filled).saturating_sub(gate.inner.filled() as u64);
        let left = taken.saturating_sub(gone);
        // Less than that in the pipe cannot be: nobody else takes anything out of it.
        let _ = gate.inner.drop_front(usize::try_from(left).unwrap_or(0));
        Words::set(&words.lines, Words::get(&words.lines_then));
    }
    Words::set(&words.taken, 0);
    let ended = Words::get(&words.ended);
    let end_tail = Words::get(&words.end_tail);
    let next = rings.get(usize::try_from(ended).unwrap_or(usize::MAX));
    if end_tail > 0 && next.is_some_and(|(ring, _)| position(ring.tail) == end_tail) {
        Words::set(&words.ended, ended + 1);
    }
    Words::set(&words.end_tail, 0);
}

/// Settles what was being taken from one of the rings.
pub(super) fn output(gate: &mut Gate, words: &Words, rings: &[(RingParts, usize)]) {
    let put = Words::get(&words.put);
    let ring = rings.get(usize::try_from(Words::get(&words.ring)).unwrap_or(usize::MAX));
    if let (1.., Some((ring, _))) = (put, ring) {
        let head = Words::get(&words.head);
        let filled = gate.out.filled();
        if position(ring.head) != head {
            if filled as u64 == put {
                // SAFETY: as above; the head of a ring to the supervisor is the supervisor's word.
                unsafe { ring.head.as_ref() }.store(head, Ordering::Release);
            } else {
                // A part of it: the ring has it all, and it is taken once more.
                let _ = gate.out.drop_front(filled);
            }
        }
    }
    Words::set(&words.put, 0);
}
