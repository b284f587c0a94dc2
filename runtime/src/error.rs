//! Errors of the runtime, and the exit code that each becomes.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | the job ended: all input processed and flushed, or drained after SIGINT or SIGTERM |
//! | 1 | the job failed while running: a source, a sink or an operator gave up |
//! | 2 | bad command line or configuration |
//! | 3 | the plan cannot be run: a stream goes nowhere, too many workers, an output in use |
//! | 4 | the machine refused something: descriptors, memory, processes |
//! | 5 | workers or supervisors kept dying, or what one left does not verify, and nothing helped |
//! | 6 | the checkpoint to resume from cannot be used: damaged, of another job, of another schema |
//! | 7 | the job ended, but some records were put aside as dead letters (completeness full) |
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
    /// What a worker left does not verify: what, and where.
    Unsound(String),
    /// A region, or the job, went back as often as it may, or could not.
    Exhausted {
        /// What was wrong at last.
        cause: String,
        /// All that was done about it, in order, and why no more.
        taken: Vec<String>,
    },
    /// Supervisors died again and again.
    Supervisor {
        /// Deaths in a row.
        deaths: u32,
        /// Cause of the last one.
        cause: String,
    },
    /// The checkpoint to resume from cannot be used, or its folder.
    Checkpoint(String),
    /// A file of a checkpoint is not as it was written.
    Damaged(String),
    /// The job ended, without records that killed their worker again and again.
    PutAside {
        /// How many.
        records: u64,
        /// The file that has them.
        file: std::path::PathBuf,
    },
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
            Self::Budget { .. } | Self::Supervisor { .. } => 5,
            Self::Unsound(_) | Self::Exhausted { .. } => 5,
            Self::Checkpoint(_) | Self::Damaged(_) => 6,
            Self::PutAside { .. } => 7,
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
            | Self::Damaged(message)
            | Self::Unsound(message) => f.write_str(message),
            Self::Budget { worker, deaths, cause } => write!(
                f,
                "worker {worker} died {deaths} times in a row without finishing a step ({cause}); \
                 mend the cause, or raise --max-restarts"
            ),
            Self::Exhausted { cause, taken } => {
                write!(f, "{cause}; what was done about it: {}", taken.join("; "))
            }
            Self::PutAside { records, file } => write!(
                f,
                "the results lack {records} records that killed their worker again and again; \
                 they are in {}, with what they did",
                file.display()
            ),
            Self::Supervisor { deaths, cause } => write!(
                f,
                "the supervisor died {deaths} times in a row (last: {cause}); the job was ended. \
                 What it said is above; a job with checkpoints goes on with --resume"
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
        let message = format!("worker segment: {error}");
        match error {
            testudo_shm::cell::CellError::Damaged => Self::Unsound(message),
            _ => Self::Machine(message),
        }
    }
}

impl From<testudo_state::checkpoint::Damage> for Error {
    fn from(damage: testudo_state::checkpoint::Damage) -> Self {
        Self::Damaged(damage.to_string())
    }
}
