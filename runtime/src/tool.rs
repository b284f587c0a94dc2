//! The `testudo` command-line tool: looks at running jobs, steers them and their checkpoints.
//!
//! ```text
//! testudo list                                   running jobs
//! testudo status JOB                             how a job is going
//! testudo kill-worker JOB N                      SIGKILL to worker N, to see it replaced
//! testudo restart JOB [--worker N]               a new process for a worker, or for each of them
//! testudo upgrade-supervisor JOB [PROGRAM]       another program leads, the workers go on
//! testudo update JOB PROGRAM                     another program takes over, worker by worker
//! testudo pause JOB | resume JOB                 sources stop taking; go on
//! testudo stop JOB [--now]                       the job ends: drained, or at once
//! testudo checkpoint JOB now                     take one, wait for it
//! testudo checkpoint JOB every 5s | at "0 * * * *" | never
//! testudo checkpoint JOB history                 what became of the latest ones
//! testudo savepoint JOB                          one that survives a change of plan
//! testudo postmortem JOB                         how workers died, and what was done about it
//! testudo checkpoint list DIR                    the checkpoints in a folder
//! testudo checkpoint show DIR [ID]               one of them, in full
//! testudo checkpoint verify DIR                  reads and compares every byte that counts
//! testudo inspect segment|manifest|root|region FILE
//! ```
//!
//! All take `--json`: one JSON object on a line, for each job, answer or thing found. Commands on
//! files need no running job and disturb none: they take no lock and write nothing.
//!
//! `list`, `show` and `verify` after `testudo checkpoint` are commands about files, not names of
//! jobs; a job of such a name is meant by `testudo checkpoint -- list now`.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | the job refused, the checkpoint failed, or what was looked at is damaged |
//! | 2 | bad command line |
//! | 3 | no such job is running |
//! | 4 | the machine refused something: a socket, a file, the output |
//! | 5 | the update was rolled back: the job runs its old program |
//!
//! Whoever reads the output may leave early (`| head`): nothing more is said then, and the exit
//! code is the same.
//!
//! Called by `bin/testudo.rs`.

mod files;

mod inspect;

mod segment;

mod jobs;

mod show;

use crate::checkpoint::schedule::Schedule;
use crate::control::client::Failure;
use crate::control::protocol::{Order, Request};
use clap::{Parser, Subcommand, ValueEnum};
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use testudo_state::checkpoint::Damage;
use testudo_state::disk::{self, Disk, DiskKind, Pool};

/// Looks at running Testudo jobs, steers them and their checkpoints, and reads what they leave
///
/// Exit codes: 0 done, 1 the job refused, the checkpoint failed or something is damaged, 2 bad
/// command line, 3 no such job is running, 4 the machine refused something, 5 the update was rolled
/// back.
#[derive(Debug, Parser)]
#[command(name = "testudo", version)]
struct Cli {
    /// Print JSON, one object a line
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Running jobs of this user
    List,
    /// How a job is going
    Status {
        /// The job's name
        job: String,
    },
    /// End a worker's process by SIGKILL, to see it replaced
    KillWorker(WorkerArgs),
    /// Replace a job's workers by new processes of the same program, one after the other, between
    /// two steps of each
    Restart {
        /// The job's name
        job: String,
        /// Only this worker, by its number from 0
        #[arg(long, value_name = "N")]
        worker: Option<usize>,
    },
    /// Let another program lead a job, while its workers go on: it must plan the same job
    UpgradeSupervisor {
        /// The job's name
        job: String,
        /// The program [default: what lies now where the present one was started from]
        program: Option<PathBuf>,
    },
    /// Let another program take a running job over, worker by worker, between two steps of each;
    /// state is kept. One that crashes or gets stuck is rolled back
    Update {
        /// The job's name
        job: String,
        /// The new program: its operators have the uids, keys and exchanges of the old one's
        program: PathBuf,
    },
    /// Let a job's sources take nothing more until it is resumed; returns when what they had taken
    /// is processed
    Pause {
        /// The job's name
        job: String,
    },
    /// Let a paused job's sources go on
    Resume {
        /// The job's name
        job: String,
    },
    /// End a job: what its sources have taken is processed first
    Stop {
        /// The job's name
        job: String,
        /// Do not process it: end at once, as a second Ctrl-C does
        #[arg(long)]
        now: bool,
    },
    /// Take checkpoints of a job, schedule them, look back at them
    ///
    /// `list`, `show` and `verify` are commands about files; for a job of such a name write
    /// `testudo checkpoint -- list now`.
    Checkpoint(CheckpointArgs),
    /// Take a savepoint of a job: a checkpoint with no data in flight, which another plan or
    /// parallelism can be resumed from
    Savepoint {
        /// The job's name
        job: String,
    },
    /// How workers of a job died: signal or panic, stack, operator, record
    Postmortem {
        /// The job's name
        job: String,
    },
    /// Show what is in one file
    Inspect {
        /// What it is
        #[arg(value_enum)]
        what: inspect::What,
        /// The file; for a segment of a running job `/proc/PID/fd/N`, where `ls -l /proc/PID/fd`
        /// shows the names of segments
        file: PathBuf,
    },
}

/// A job and one of its workers.
#[derive(Debug, clap::Args)]
struct WorkerArgs {
    /// The job's name
    job: String,
    /// Number of the worker, from 0
    #[arg(required_unless_present = "worker", value_name = "N")]
    number: Option<usize>,
    /// The same
    #[arg(long, value_name = "N", conflicts_with = "number")]
    worker: Option<usize>,
}

impl WorkerArgs {
    fn worker(&self) -> usize {
        self.number.or(self.worker).unwrap_or_default()
    }
}

#[derive(Debug, clap::Args)]
#[command(subcommand_negates_reqs = true)]
struct CheckpointArgs {
    #[command(subcommand)]
    files: Option<files::Command>,
    /// The job's name
    #[arg(required = true)]
    job: Option<String>,
    /// What to do
    #[arg(value_enum, required = true)]
    order: Option<OrderName>,
    /// For `every`: a time such as 200ms, 5s, 5m. For `at`: a clock pattern in UTC, minute, hour,
    /// day, month and day of the week, such as "0 * * * *" for each full hour
    when: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OrderName {
    /// Take one now and wait for it
    Now,
    /// Take one in each interval of this length from now on
    Every,
    /// Take one whenever the clock matches, from now on
    At,
    /// Take none from now on but those asked for
    Never,
    /// What became of the latest ones
    History,
}

impl CheckpointArgs {
    /// The job and the request that this means.
    fn request(&self) -> Result<(&str, Request), Ended> {
        let (Some(job), Some(order)) = (&self.job, self.order) else {
            return Err(Ended::usage("which job, and what is it to do?"));
        };
        let order = match (order, self.when.as_deref()) {
            (OrderName::Now, None) => Order::Now,
            (OrderName::History, None) => Order::History,
            (OrderName::Never, None) => Order::Schedule(Schedule::Never),
            (OrderName::Every, Some(when)) => match when.parse() {
                Ok(schedule @ Schedule::Every(_)) => Order::Schedule(schedule),
                Ok(_) => return Err(Ended::usage(format!("every {when:?}: write a time like 5s"))),
                Err(error) => return Err(Ended::usage(format!("every {error}"))),
            },
            (OrderName::At, Some(when)) => match when.parse() {
                Ok(pattern) => Order::Schedule(Schedule::At(pattern)),
                Err(error) => return Err(Ended::usage(format!("at {error}"))),
            },
            (OrderName::Every, None) => return Err(Ended::usage("every what? such as every 5s")),
            (OrderName::At, None) => {
                return Err(Ended::usage("at what? such as at \"0 * * * *\""));
            }
            (_, Some(when)) => return Err(Ended::usage(format!("{when:?} is one word too many"))),
        };
        Ok((job, Request::Checkpoint { order }))
    }
}

/// How a command did not come to its end.
#[derive(Debug)]
struct Ended {
    code: u8,
    message: String,
}

impl Ended {
    /// The job refused, or something is not as it should be.
    fn refused(message: impl Into<String>) -> Self {
        Self { code: 1, message: message.into() }
    }

    fn usage(message: impl Into<String>) -> Self {
        Self { code: 2, message: message.into() }
    }

    /// The update was, and the old program runs.
    fn rolled_back(message: impl Into<String>) -> Self {
        Self { code: 5, message: message.into() }
    }

    fn machine(message: impl Into<String>) -> Self {
        Self { code: 4, message: message.into() }
    }
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        let code = if matches!(failure, Failure::NoJob { .. }) { 3 } else { 4 };
        Self { code, message: failure.to_string() }
    }
}

impl From<Damage> for Ended {
    fn from(damage: Damage) -> Self {
        Self::refused(damage.to_string())
    }
}

/// Buffers for reading files.
const STAGING_BYTES: usize = 4 << 20;

/// A disk to read files with, and its buffers.
fn disk() -> Result<(Box<dyn Disk>, Pool), Ended> {
    // Whether it is io_uring makes no difference that a tool would have to tell.
    let (disk, _) =
        disk::open(DiskKind::Auto).map_err(|error| Ended::machine(error.to_string()))?;
    Ok((disk, Pool::new(STAGING_BYTES)))
}

/// The output, until nobody reads it any more.
struct Out {
    as_json: bool,
    left: bool,
}

impl Out {
    /// Prints text, whole lines.
    fn print(&mut self, text: &str) -> Result<(), Ended> {
        if self.left {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.left = true;
                Ok(())
            }
            Err(error) => Err(Ended::machine(format!("cannot write the output: {error}"))),
            Ok(()) => Ok(()),
        }
    }

    /// Prints a value as a line of JSON.
    fn json(&mut self, value: &impl serde::Serialize) -> Result<(), Ended> {
        let text = serde_json::to_string(value)
            .map_err(|error| Ended::machine(format!("the answer has no JSON form: {error}")))?;
        self.print(&(text + "\n"))
    }
}

/// The whole main of the tool.
#[must_use]
pub fn main() -> ExitCode {
    crate::limits::ensure_stack_or_exit("testudo");
    parse_and_run()
}

#[inline(never)]
fn parse_and_run() -> ExitCode {
    let cli = Cli::parse();
    let mut out = Out { as_json: cli.json, left: false };
    match run(cli.command, &mut out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(ended) => {
            // Standard error may be gone as well: eprintln would panic then.
            let _ = writeln!(io::stderr(), "testudo: {}", ended.message);
            ExitCode::from(ended.code)
        }
    }
}

fn run(command: Command, out: &mut Out) -> Result<(), Ended> {
    match command {
        Command::List => jobs::list(out),
        Command::Status { job } => jobs::ask(out, &job, &Request::Status),
        Command::KillWorker(args) => {
            jobs::ask(out, &args.job, &Request::KillWorker { worker: args.worker() })
        }
        Command::Restart { job, worker } => jobs::ask(out, &job, &Request::Restart { worker }),
        Command::UpgradeSupervisor { job, program } => {
            let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
            jobs::upgrade(out, &job, program.map(absolute))
        }
        Command::Update { job, program } => {
            let program = std::path::absolute(&program)
                .map_err(|error| Ended::usage(format!("{}: {error}", program.display())))?;
            jobs::ask(out, &job, &Request::Update { program })
        }
        Command::Pause { job } => jobs::ask(out, &job, &Request::Pause),
        Command::Resume { job } => jobs::ask(out, &job, &Request::Resume),
        Command::Stop { job, now } => jobs::ask(out, &job, &Request::Stop { now }),
        Command::Checkpoint(args) => match (&args.files, &args.job) {
            (None, _) => {
                let (job, request) = args.request()?;
                jobs::ask(out, job, &request)
            }
            (Some(command), None) => files::run(out, command),
            (Some(_), Some(job)) => {
                Err(Ended::usage(format!("a command about files takes no job ({job:?})")))
            }
        },
        Command::Savepoint { job } => jobs::ask(out, &job, &Request::Savepoint),
        Command::Postmortem { job } => jobs::ask(out, &job, &Request::Postmortem),
        Command::Inspect { what, file } => inspect::run(out, what, &file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(words: &[&str]) -> Result<Request, String> {
        let words = ["testudo", "checkpoint"].iter().chain(words);
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Checkpoint(args) => {
                args.request().map(|asked| asked.1).map_err(|ended| ended.message)
            }
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn orders_are_read_as_documented() {
        let schedule = |text: &str| Order::Schedule(text.parse().expect(text));
        let cases = [
            (&["job", "now"][..], Order::Now),
            (&["job", "history"], Order::History),
            (&["job", "never"], schedule("never")),
            (&["job", "every", "5s"], schedule("5s")),
            (&["job", "at", "0 * * * *"], schedule("0 * * * *")),
            (&["--", "list", "now"], Order::Now),
        ];
        for (words, order) in cases {
            assert_eq!(request(words), Ok(Request::Checkpoint { order }), "{words:?}");
        }
    }

    #[test]
    fn orders_that_are_none_are_refused() {
        let cases = [
            &["job"][..],
            &["job", "soon"],
            &["job", "every"],
            &["job", "every", "never"],
            &["job", "every", "0 * * * *"],
            &["job", "at"],
            &["job", "at", "5s"],
            &["job", "now", "5s"],
            &["job", "never", "5s"],
        ];
        for words in cases {
            assert!(request(words).is_err(), "{words:?}");
        }
    }
}
