//! Errors of the runtime, and the exit code that each becomes.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | the job ended: all input processed and flushed, or drained after SIGINT or SIGTERM |
//! | 1 | the job failed while running: a source, a sink or an operator gave up |
//! | 2 | bad command line or configuration |
//! | 3 | the plan cannot be run: a stream goes nowhere, too many workers, an output in use |
//! | 4 | the machine refused something: descriptors, memory, processes |
//! | 5 | a worker kept dying without committing anything: the restart budget is used up |
//! | 6 | the checkpoint to resume from cannot be used: damaged, of another job, of another schema |
//! | 130 | stopped at once by a second SIGINT or SIGTERM |

use std::fmt;

/// What ended a job, or kept it from starting.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A source, sink or operator gave up.
    Job {
        /// The operator's name.
        operator: String,
        /// What happened and what to do.
        message: String,
    },
    /// The command line or the configuration file is wrong.
    Usage(String),
    /// The dataflow cannot be planned.
    Plan(String),
    /// The machine refused something.
    Machine(String),
    /// A worker died again and again without a commit in between.
    Budget {
        /// The worker's index.
        worker: usize,
        /// Deaths in a row.
        deaths: u32,
        /// Cause of the last one, with its last words.
        cause: String,
    },
    /// The checkpoint to resume from cannot be used, or its folder.
    Checkpoint(String),
    /// A file of a checkpoint is not as it was written.
    Damaged(String),
    /// Stopped at once on request.
    Stopped,
}

impl Error {
    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Job { .. } => 1,
            Self::Usage(_) => 2,
            Self::Plan(_) => 3,
            Self::Machine(_) => 4,
            Self::Budget { .. } => 5,
            Self::Checkpoint(_) | Self::Damaged(_) => 6,
            Self::Stopped => 130,
        }
    }

    /// An operator's failure.
    pub(crate) fn job(operator: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        // Errors of state name the operator themselves.
        let own = format!("operator {operator}: ");
        let message = message.strip_prefix(&own).map_or(message.clone(), str::to_owned);
        Self::Job { operator: operator.into(), message }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Job { operator, message } => write!(f, "operator {operator}: {message}"),
            Self::Usage(message)
            | Self::Plan(message)
            | Self::Machine(message)
            | Self::Checkpoint(message)
            | Self::Damaged(message) => f.write_str(message),
            Self::Budget { worker, deaths, cause } => write!(
                f,
                "worker {worker} died {deaths} times in a row without finishing a step ({cause}); \
                 mend the cause, or raise --restart-budget"
            ),
            Self::Stopped => f.write_str("stopped before the end, on request"),
        }
    }
}

impl std::error::Error for Error {}

impl From<testudo_shm::fault::SetupError> for Error {
    fn from(error: testudo_shm::fault::SetupError) -> Self {
        Self::Machine(error.to_string())
    }
}

impl From<testudo_shm::cell::CellError> for Error {
    fn from(error: testudo_shm::cell::CellError) -> Self {
        Self::Machine(format!("worker segment: {error}"))
    }
}

impl From<testudo_state::checkpoint::Damage> for Error {
    fn from(damage: testudo_state::checkpoint::Damage) -> Self {
        Self::Damaged(damage.to_string())
    }
}
