//! Sources: where records enter. A source is read by one [`Reader`] for each subtask, and
//! everything that it needs to go on after a crash is its position, which lives in a cell.
//!
//! Contract: a reader opened at a position emits the same records from there on as the one that
//! died would have (R13). The engine stores the position in the step's transaction together with
//! what the records led to, so nothing is lost or doubled. Reads land in private memory (R4).
//!
//! `stage` is the engine's side; `generator`, `file` and `stdin` are the sources that come with it;
//! `blocking` is for those whose readers must wait.

pub(crate) mod stage;

pub mod generator;

pub mod file;

pub mod stdin;

pub mod blocking;

use testudo_shm::record::Record;
use testudo_shm::txn::Plain;

/// Which part of a source a reader is to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subtask {
    /// Index of this subtask, from 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

/// What the job's settings ask of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wishes {
    /// Records of the whole job after which it stops (`--limit`).
    pub limit: Option<u64>,
    /// Input is not to be cut (`--no-split`).
    pub keep_whole: bool,
}

/// What a reader found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// There is more now.
    More,
    /// Nothing now; look again when so many nanoseconds have passed (monotonic clock), or when the
    /// source wakes us.
    Idle {
        /// Nanoseconds of the monotonic clock ([`now_ns`](crate::time::now_ns)).
        until_ns: u64,
    },
    /// What it reads from does not answer, which may pass: look again then, as with `Idle`. Status
    /// and metrics show it as an outage.
    Blocked {
        /// As in `Idle`.
        until_ns: u64,
        /// The operating system's number of the error; 0 for none.
        errno: i32,
    },
    /// Nothing will ever follow.
    End,
}

/// A source of records.
///
/// ```
/// use testudo::source::{Collect, Progress, Reader, Source, Subtask};
///
/// /// Counts from the subtask's index up, in steps of the parallelism.
/// struct Counting {
///     end: u64,
/// }
///
/// struct CountingReader {
///     end: u64,
///     step: u64,
/// }
///
/// impl Source for Counting {
///     type Out = u64;
///     type Position = u64;
///     type Reader = CountingReader;
///     fn start(&self, subtask: Subtask) -> u64 {
///         subtask.index as u64
///     }
///     fn open(&self, subtask: Subtask, _from: &u64) -> Result<CountingReader, String> {
///         Ok(CountingReader { end: self.end, step: subtask.count as u64 })
///     }
/// }
///
/// impl Reader<u64, u64> for CountingReader {
///     fn read(
///         &mut self,
///         at: &mut u64,
///         max: usize,
///         out: &mut impl Collect<u64>,
///     ) -> Result<Progress, String> {
///         for _ in 0..max {
///             if *at >= self.end {
///                 return Ok(Progress::End);
///             }
///             out.emit(*at);
///             *at += self.step;
///         }
///         Ok(Progress::More)
///     }
/// }
/// ```
pub trait Source: 'static {
    /// What it emits.
    type Out: Record;
    /// Everything that must survive a reader.
    type Position: Plain;
    /// Reads one subtask's part.
    type Reader: Reader<Self::Out, Self::Position>;

    /// The first position of a subtask.
    fn start(&self, subtask: Subtask) -> Self::Position;

    /// Opens a subtask's part at a position: the first one, or where a predecessor stood at its
    /// last commit.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn open(&self, subtask: Subtask, from: &Self::Position) -> Result<Self::Reader, String>;

    /// Looks once at what there is to read, in the launching process before the job starts: a
    /// missing file is found here. The result is handed to [`Source::configure`] in every process,
    /// so that all see the same.
    ///
    /// # Errors
    /// What is wrong, and what to do about it.
    fn survey(&self, wishes: &Wishes) -> Result<String, String> {
        let _ = wishes;
        Ok(String::new())
    }

    /// Takes the survey and the job's wishes, in every process, before anything is opened. True
    /// when the source stops by itself at exactly [`Wishes::limit`] records of the whole job;
    /// otherwise the engine divides the limit among the subtasks.
    ///
    /// # Errors
    /// What is wrong, and what to do about it.
    fn configure(&mut self, survey: &str, wishes: &Wishes) -> Result<bool, String> {
        let _ = (survey, wishes);
        Ok(false)
    }

    /// The files that this source reads: no sink of the job may write to one of them.
    fn inputs(&self) -> Vec<std::path::PathBuf> {
        Vec::new()
    }

    /// False when what was read once cannot be read again, as from a socket: a job with such a
    /// source is one of partial completeness, unless something else is asked for. (Standard input
    /// waits in the launching process, which no worker's death touches: it counts as replayable.)
    fn is_replayable(&self) -> bool {
        true
    }

    /// True when this source may refuse input, so that a rejects file has something to hold.
    fn may_reject(&self) -> bool {
        false
    }
}

/// Reads one subtask's part of a source.
pub trait Reader<T: Record, P: Plain>: 'static {
    /// Emits up to `max` records and moves `position` behind them. Must not block for long: see
    /// [`Progress::Idle`]; one that must is for [`Blocking`](blocking::Blocking).
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn read(
        &mut self,
        position: &mut P,
        max: usize,
        out: &mut impl Collect<T>,
    ) -> Result<Progress, String>;

    /// Moves `position` behind the next record without making it, and gives the bytes that it would
    /// have been made from: it has killed its worker again and again, perhaps while it was made,
    /// and is put aside. `None`, as without this method, when the reader cannot: the record is then
    /// made once more, for nobody.
    ///
    /// # Errors
    /// What is wrong, and what to do about it; the job fails with this text.
    fn skip(&mut self, position: &mut P) -> Result<Option<Vec<u8>>, String> {
        let _ = position;
        Ok(None)
    }

    /// A position for people: what they need to find the record that comes next.
    fn origin(&self, position: &P) -> String {
        let words = position.as_bytes().chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word).to_string()
        });
        format!("position {}", words.collect::<Vec<_>>().join("/"))
    }
}

/// Where a reader puts its records.
pub trait Collect<T: Record> {
    /// Emits one record.
    fn emit(&mut self, value: T);

    /// Emits several records: what a reader that makes them in blocks should do.
    fn emit_all(&mut self, values: &[T]);

    /// Counts an input that was refused (a bad line); its description becomes a line of the rejects
    /// file.
    fn reject(&mut self, description: String);
}
