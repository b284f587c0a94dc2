//! Testudo: a stream-processing engine for one machine.
//!
//! Worker processes, each pinned to a core, exchange records in place through lock-free rings in
//! shared memory. A worker that crashes is replaced within milliseconds: what it had committed is
//! kept, nothing is processed twice, its peers do not stop. See the repository's README for a first
//! job and ARCHITECTURE.md for how it works.
//!
//! The modules stand in the order in which a user meets them, then in the order in which a record
//! does.

#![deny(unsafe_code)]

/// Writes a line to standard error. A log that takes nothing any more (a full disk, a closed pipe)
/// is no reason to end a job.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// As `say`, without the line's end.
macro_rules! say_part {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = write!(std::io::stderr(), $($text)*);
    }};
}

pub(crate) use {say, say_part};

pub mod error;

pub mod config;

mod limits;

pub mod slo;

pub mod cli;

pub mod flow;

pub mod plan;

pub mod source;

pub(crate) mod exchange;

pub(crate) mod operator;

pub mod window;

pub mod time;

pub mod sink;

mod haste;

mod keeper;

pub mod worker;

pub mod checkpoint;

pub mod control;

pub mod supervisor;

pub mod metrics;

pub mod testing;

pub mod tool;

pub use cli::{NoOptions, main, main_with};
pub use error::Error;
pub use testudo_shm as shm;
pub use testudo_shm::record;
pub use testudo_state as state;
pub use {clap, serde, serde_json};

/// First line of main in any program that runs jobs: in a worker process it runs the worker and
/// does not return. A stack that is limited too far ends the process with a message, and a file
/// that may not grow (`ulimit -f`) is an error from here on, not a signal.
///
/// [`main`](fn@crate::main) calls it by itself.
pub fn init() {
    limits::ensure_stack_or_exit(&cli::program_name());
    limits::refuse_long_files();
    if let Some(role) = worker::entry::role()
        && role.entry != 0
    {
        let job = worker::entry::job_at(role.entry);
        worker::entry::run(role, job);
    }
}

/// What most jobs need.
pub mod prelude {
    pub use crate::cli::NoOptions;
    pub use crate::config::{Completeness, Settings, Tier};
    pub use crate::flow::Flow;
    pub use crate::flow::windowed::Bounds;
    pub use crate::operator::expire::Ttl;
    pub use crate::operator::stateless::Emit;
    pub use crate::sink::file::FileSink;
    pub use crate::source::file::FileSource;
    pub use crate::source::generator::Generator;
    pub use crate::supervisor::launch::Job;
    pub use crate::supervisor::report::Report;
    pub use crate::window::{sliding, tumbling};
    pub use std::time::Duration;
}
