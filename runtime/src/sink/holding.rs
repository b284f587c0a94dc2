//! What a sink could not write: the output of a committed step, kept in the worker's own segment
//! until the system outside takes it again.
//!
//! A step does not wait for a disk (R7), and what it has done must not be lost with its worker. So
//! a step whose output is refused hands the bytes to this area, in its own transaction, and
//! commits; the sink has no room from then on, and tries again between steps.
//!
//! Invariants:
//! - bytes are here or in the output, never in both: they leave in the transaction that moves the
//!   sink's position;
//! - they are in the order in which they were refused, and nothing is written before them;
//! - while there are any, the worker takes part in no cut: what is not on disk cannot be in a
//!   checkpoint (R13).
//!
//! Called by the end of a stage with a sink; made by `attach`.

use crate::worker::context::Cx;
use testudo_shm::record::{Record, Scratch};
use testudo_shm::spill::Spill;

/// Bytes of output in one piece.
const PIECE: usize = 4088;

/// A piece of refused output, as it lies in the area.
#[testudo_shm::record(crate = testudo_shm)]
struct Piece {
    used: u64,
    bytes: [u8; PIECE],
}

/// A sink's refused output.
#[derive(Debug)]
pub(crate) struct Holding {
    spill: Spill,
}

impl Holding {
    pub(crate) fn new(spill: Spill) -> Self {
        Self { spill }
    }

    pub(crate) fn is_empty(&self, cx: &Cx) -> bool {
        self.spill.is_empty(&cx.txn)
    }

    /// Takes output that was refused; a part of the open step. False when there is no more room.
    pub(crate) fn keep(&mut self, cx: &mut Cx, output: &[u8]) -> bool {
        output.chunks(PIECE).all(|chunk| {
            let mut piece = Piece { used: chunk.len() as u64, bytes: [0; PIECE] };
            piece.bytes[..chunk.len()].copy_from_slice(chunk);
            let mut scratch = Scratch::default();
            self.spill.push(&mut cx.txn, piece.item(&mut scratch)).is_ok()
        })
    }

    /// All of it, in order.
    pub(crate) fn kept(&self, cx: &Cx) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in self.spill.front::<Piece>(&cx.txn, usize::MAX) {
            let used = (piece.view.used as usize).min(PIECE);
            all.extend_from_slice(&piece.view.bytes[..used]);
        }
        all
    }

    /// It is written: a part of the open step.
    pub(crate) fn release(&mut self, cx: &mut Cx) {
        self.spill.discard::<Piece>(&mut cx.txn);
    }

    /// Gives memory back that is not needed any more.
    pub(crate) fn trim(&mut self, cx: &Cx) {
        self.spill.trim(&cx.txn);
    }
}
