//! A question to all folders of checkpoints: what a region may go back to. Each folder's thread
//! answers when it has done what came before; the loop does not wait for it.
//!
//! Invariants: a checkpoint is chosen once every folder has answered; that none has any is an
//! answer, that one cannot be read is not: unless another has a checkpoint, it is an error.
//!
//! Made by `checkpoint`, asked by `rewind` at each turn.

use crate::error::Error;
use crate::supervisor::resume::{Chosen, newest};
use crossbeam::channel::{Receiver, TryRecvError};

/// What one folder has.
type Answer = Result<Option<Chosen>, Error>;

/// See the module.
pub(crate) struct Asked {
    waiting: Vec<Receiver<Answer>>,
    found: Vec<Chosen>,
    failure: Option<Error>,
}

impl Asked {
    pub(crate) fn new(waiting: Vec<Receiver<Answer>>) -> Self {
        let is_nobody = waiting.is_empty();
        let failure = || Error::Checkpoint("no checkpoint folder is open".into());
        Self { waiting, found: Vec::new(), failure: is_nobody.then(failure) }
    }

    /// The newest of all, once everybody has answered.
    pub(crate) fn answer(&mut self) -> Option<Answer> {
        let (found, failure) = (&mut self.found, &mut self.failure);
        self.waiting.retain(|answer| {
            match answer.try_recv() {
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => {
                    let gone = "the thread of a checkpoint folder is gone";
                    *failure = Some(Error::Machine(gone.into()));
                }
                Ok(Err(error)) => *failure = Some(error),
                Ok(Ok(chosen)) => found.extend(chosen),
            }
            false
        });
        if !self.waiting.is_empty() {
            return None;
        }
        let newest = newest(std::mem::take(&mut self.found));
        Some(match (newest, self.failure.take()) {
            (None, Some(error)) => Err(error),
            (newest, Some(error)) => {
                crate::say!("testudo: {error}");
                Ok(newest)
            }
            (newest, None) => Ok(newest),
        })
    }
}
