//! Jobs as programs: this test program again, as `testudo::main` with the job of a given name.

use super::{Jobs, PATIENCE, process};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use testudo::clap;
use testudo::prelude::*;

/// Set in the environment of a program that is to run a job.
const ASKED: &str = "TESTUDO_TEST_PROGRAM";

#[derive(Debug, clap::Args)]
struct Options {
    /// Name of the job
    #[arg(long, default_value = "")]
    job: String,
    /// Its parameters
    #[arg(long, default_value = "")]
    parameters: String,
}

pub fn is_asked_for() -> bool {
    std::env::var_os(ASKED).is_some()
}

/// Runs the job that the command line names.
pub fn run(jobs: Jobs) -> ExitCode {
    testudo::main(move |flow: &Flow, options: &Options| {
        match jobs.iter().find(|(name, _)| *name == options.job) {
            Some((_, build)) => build(flow, &options.parameters),
            None => panic!("no job is called {:?}", options.job),
        }
    })
}

/// A job to be run as a program.
pub struct Cli {
    command: Command,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Cli {
    /// A job of this program, called `job` in its messages.
    pub fn new(job: &str, parameters: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("our own path"));
        command.arg0("job").env(ASKED, "1").stdin(Stdio::null());
        command.args(["--job", job, "--parameters", parameters]);
        Self { command }
    }

    /// An example of this package, which `cargo test` has built along with the tests.
    pub fn example(name: &str) -> Self {
        let own = std::env::current_exe().expect("our own path");
        let built = own.ancestors().nth(2).expect("target/PROFILE/deps/TEST").join("examples");
        let path = built.join(name);
        assert!(path.is_file(), "{}: build it with `cargo build --examples`", path.display());
        let mut command = Command::new(path);
        command.stdin(Stdio::null());
        Self { command }
    }

    pub fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.command.args(args);
        self
    }

    pub fn workers(self, workers: usize) -> Self {
        let workers = workers.to_string();
        self.args(["--workers", &workers, "--key-groups", "16", "--ring-bytes", "64KiB"])
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Has futex_waitv fail with this error.
    pub fn without_futex_waitv(self, error: i32) -> Self {
        self.without_call(libc::SYS_futex_waitv, error)
    }

    /// Has a system call fail with this error.
    pub fn without_call(mut self, call: libc::c_long, error: i32) -> Self {
        process::refuse(&mut self.command, call, error);
        self
    }

    /// Has it inherit these, from number 3 on.
    pub fn with_descriptors(mut self, fds: Vec<OwnedFd>) -> Self {
        super::manager::hand_over(&mut self.command, fds);
        self
    }

    /// Gives it a process group of its own, as a shell gives to what it runs in a terminal.
    pub fn own_group(mut self) -> Self {
        self.command.process_group(0);
        self
    }

    pub fn stdin(mut self, stdin: Stdio) -> Self {
        self.command.stdin(stdin);
        self
    }

    /// Runs it under a shell command that ends in `exec "$@"`, such as one that lowers a limit
    /// first.
    pub fn under(self, shell: &str) -> Self {
        self.behind(Command::new("sh"), shell)
    }

    /// As `under`, in a mount namespace of its own.
    pub fn under_unshared(self, shell: &str) -> Self {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "sh"]);
        self.behind(unshare, shell)
    }

    fn behind(self, mut command: Command, shell: &str) -> Self {
        command.args(["-c", shell, "sh"]).arg(self.command.get_program());
        command.args(self.command.get_args()).env(ASKED, "1").stdin(Stdio::null());
        for (name, value) in self.command.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        Self { command }
    }

    /// Starts it; its output is collected.
    #[expect(clippy::disallowed_methods, reason = "a program under test, not a worker")]
    pub fn start(mut self) -> Started {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        process::end_with_us(&mut self.command);
        let mut child = self.command.spawn().expect("the test program can be started");
        let out = collect(child.stdout.take());
        let err = collect(child.stderr.take());
        Started { child, out, err }
    }

    /// Starts it with its output in a pipe of the test's own, and without its report.
    #[expect(clippy::disallowed_methods, reason = "a program under test, not a worker")]
    pub fn start_bare(mut self) -> Child {
        self.command.stdout(Stdio::piped()).stderr(Stdio::null());
        process::end_with_us(&mut self.command);
        self.command.spawn().expect("the test program can be started")
    }

    /// Starts it with its output in the child's pipe, for the test to read; the rest is collected.
    #[expect(clippy::disallowed_methods, reason = "a program under test, not a worker")]
    pub fn start_for_reading(mut self) -> Started {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        process::end_with_us(&mut self.command);
        let mut child = self.command.spawn().expect("the test program can be started");
        let err = collect(child.stderr.take());
        Started { child, out: collect(None::<std::io::Empty>), err }
    }

    /// Starts it with both of its outputs in pipes that nobody reads any more.
    #[expect(clippy::disallowed_methods, reason = "a program under test, not a worker")]
    pub fn start_deaf(mut self) -> Child {
        let closed = || std::io::pipe().expect("a pipe").1;
        self.command.stdout(closed()).stderr(closed());
        process::end_with_us(&mut self.command);
        self.command.spawn().expect("the test program can be started")
    }

    /// Runs it to its end with its output going elsewhere.
    pub fn run_into(self, out: Stdio) -> Ended {
        self.start_into(out).wait()
    }

    /// Starts it with its output going elsewhere.
    #[expect(clippy::disallowed_methods, reason = "a program under test, not a worker")]
    pub fn start_into(mut self, out: Stdio) -> Started {
        self.command.stdout(out).stderr(Stdio::piped());
        process::end_with_us(&mut self.command);
        let mut child = self.command.spawn().expect("the test program can be started");
        let err = collect(child.stderr.take());
        let out = collect(None::<std::io::Empty>);
        Started { child, out, err }
    }

    /// Runs it to its end.
    pub fn run(self) -> Ended {
        self.start().wait()
    }
}

/// What a thread of the test reads from the program; taken when it is over.
type Collected = Option<std::thread::JoinHandle<String>>;

fn collect(stream: Option<impl Read + Send + 'static>) -> Collected {
    Some(std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            stream.read_to_end(&mut bytes).expect("a pipe can be read");
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }))
}

fn collected(by: &mut Collected) -> String {
    by.take().map_or_else(String::new, |thread| thread.join().expect("the collector"))
}

/// A job that runs as a program.
pub struct Started {
    pub child: Child,
    out: Collected,
    err: Collected,
}

impl Started {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        let held = process::Held::child_of(self.pid(), std::process::id());
        assert!(held.is_some_and(|held| held.signal(signal)), "the job ended before the signal");
    }

    /// Sends a signal to its process group, as a terminal does.
    pub fn signal_group(&self, signal: i32) {
        process::signal_group(self.pid(), signal);
    }

    /// Waits until its workers run, and gives their numbers.
    pub fn workers(&self, count: usize) -> Vec<u32> {
        super::wait_for("the workers of a started job", || {
            let workers = process::workers_of(self.pid());
            (workers.len() == count).then_some(workers)
        })
    }

    /// Waits until each worker has committed a step: it has claimed what is its own, so no later
    /// supervisor replaces it, and has read something.
    pub fn working(&self, count: usize) -> Vec<u32> {
        super::wait_for("steps of all workers", || {
            let commits = process::commits(self.pid());
            (commits.len() == count && commits.values().all(|n| *n > 0)).then_some(())
        });
        self.workers(count)
    }

    /// Waits until it has a supervisor, and gives its number.
    pub fn supervisor(&self) -> u32 {
        super::wait_for("the supervisor of a job", || process::supervisor_of(self.pid()))
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break status;
            }
            if begun.elapsed() > PATIENCE {
                self.child.kill().expect("our own child");
                let end = self.child.wait();
                let err = collected(&mut self.err);
                panic!("the program hung ({end:?}); it said: {err}");
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        Ended {
            code: status.code(),
            signal: status.signal(),
            out: collected(&mut self.out),
            err: collected(&mut self.err),
        }
    }
}

impl Drop for Started {
    /// A test that fails leaves no job running behind it, and tells what it said.
    fn drop(&mut self) {
        // One that was waited for is gone, and the library knows that.
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let err = collected(&mut self.err);
            eprintln!("the job of the failed test ({ended:?}) said: {err}");
        }
    }
}

impl Ended {
    /// Its report, from a job run with `--report json`; fails the test unless it ended well.
    pub fn report(&self) -> testudo::serde_json::Value {
        assert_eq!(self.code, Some(0), "the job failed: {}", self.err);
        let line = self.err.lines().find(|line| line.starts_with('{'));
        let line = line.unwrap_or_else(|| panic!("no report in {:?}", self.err));
        testudo::serde_json::from_str(line).expect("a report is JSON")
    }

    /// How many deaths its report tells of.
    pub fn restarts(&self) -> usize {
        self.report()["restarts"].as_array().map_or(0, Vec::len)
    }
}
