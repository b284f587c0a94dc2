//! The keeper: the launched process of a job. It holds the job's descriptors, starts a supervisor
//! and, when that dies, the next one; it passes signals on and exits last, with the job's exit
//! code.
//!
//! Invariants: one thread; nothing of the user's runs in it once it keeps; it never looks into a
//! segment; its death ends all processes of the job: the supervisor by a parent-death signal, the
//! workers by their leash. What a dead supervisor leaves comes to it (it is their subreaper) and is
//! waited for. A successor is started only once the dead one was waited for, which is the proof of
//! its death (R2).
//!
//! Who counts against the budget: a supervisor that dies by its own doing before it has taken the
//! job over, or soon after; kills from outside count only far beyond that (R17).
//!
//! `message` and `line` are what both say, `start` starts a supervisor, `role` is how that knows,
//! `leash` what ends a worker, `store` what a killed keeper leaves to the next one. Called by
//! `testudo::main`.

#![expect(unsafe_code, reason = "signals, waiting for processes")]

pub(crate) mod leash;

pub(crate) mod line;

mod message;

pub(crate) mod role;

mod start;

mod store;

pub(crate) use line::{Line, line, place};

use crate::error::Error;
use crate::supervisor::launch::raise_descriptor_limit;
use message::{Heard, Kind, Packet, Received};
use role::{Job, Role};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use store::Store;

/// Deaths of supervisors in a row, by their own doing, after which the job has failed.
const BUDGET: u32 = 8;

/// The same for deaths by SIGKILL before the job was taken over.
const BUDGET_KILLED: u32 = 100;

/// Pause before the second attempt in a row; twice that before the next.
const PAUSE: Duration = Duration::from_millis(2);

/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Who has led the job for so long is not counted when it dies.
const SOUND: Duration = Duration::from_secs(10);

/// How long the supervisor of another program may take to take the job over.
const UPGRADE: Duration = Duration::from_secs(10);

/// How long workers may take to end once their leash is let go.
const LEAVING: Duration = Duration::from_secs(5);

/// Ends of processes that the next supervisor is told of.
const ENDED_MAX: usize = 128;

/// A supervisor that runs.
#[derive(Debug)]
struct Supervisor {
    pid: i32,
    line: OwnedFd,
    since: Instant,
    /// It has said that all workers are watched.
    is_running: bool,
    /// If it leaves by itself now, it means to.
    is_ending: bool,
    over: Option<u8>,
    /// The program that is to follow it.
    successor: Option<Vec<u8>>,
}

/// The keeper's state.
#[derive(Debug)]
struct Keeper {
    program: String,
    signals: OwnedFd,
    held_back: Vec<libc::c_int>,
    /// The end of the leash that is handed down; its own end, until all are to go.
    leash: OwnedFd,
    grip: Option<OwnedFd>,
    held: Vec<OwnedFd>,
    /// The first descriptor that could not be held, as an error number.
    refused: u32,
    job: Option<Job>,
    supervisor: Option<Supervisor>,
    /// What else holds them.
    store: Option<Store>,
    reign: u32,
    stops: u32,
    deaths: u32,
    killed: u32,
    /// When the next one is due.
    due: Option<Instant>,
    ended: VecDeque<(i32, i32)>,
    /// The program of supervisors after an upgrade, and the one before while it is on trial.
    binary: Option<OwnedFd>,
    before: Option<Option<OwnedFd>>,
}

/// Keeps a job until it is over; gives its exit code.
pub(crate) fn keep(program: &str) -> ExitCode {
    let failed = |error: io::Error| Error::Machine(format!("the job cannot be kept: {error}"));
    let code = match Keeper::new(program).map_err(failed) {
        Ok(mut keeper) => keeper.run(),
        Err(error) => {
            crate::say!("{program}: {error}");
            error.exit_code()
        }
    };
    ExitCode::from(code)
}

impl Keeper {
    fn new(program: &str) -> io::Result<Self> {
        raise_descriptor_limit();
        // SAFETY: plain system call.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
        let held_back = passed_on();
        // First of all: what is inherited has numbers that others could get.
        let mut store = Store::open();
        let left = store.as_mut().and_then(Store::left);
        if left.is_some() {
            crate::say!("testudo: the job goes on with the memory that the service manager kept");
        }
        let reign = if left.is_some() { later_reign() } else { 0 };
        let (held, job) = left.map_or((Vec::new(), None), |(held, job)| (held, Some(job)));
        let signals = signal_fd(&held_back)?;
        let (leash, grip) = leash::pipe()?;
        Ok(Self {
            program: program.into(),
            signals,
            held_back,
            leash,
            grip: Some(grip),
            held,
            refused: 0,
            job,
            supervisor: None,
            store,
            reign,
            stops: 0,
            deaths: 0,
            killed: 0,
            due: Some(Instant::now()),
            ended: VecDeque::new(),
            binary: None,
            before: None,
        })
    }

    fn run(&mut self) -> u8 {
        loop {
            if self.due.is_some_and(|due| due <= Instant::now())
                && let Err(code) = self.start()
            {
                return self.end(code);
            }
            self.wait();
            self.take_signals();
            self.hear();
            if let Some(code) = self.reap() {
                return self.end(code);
            }
            self.judge_upgrade();
            if self.stops > 1 && self.supervisor.is_none() && self.deaths + self.killed > 1 {
                crate::say!("{}: {}", self.program, Error::Stopped);
                return self.end(Error::Stopped.exit_code());
            }
        }
    }

    /// Starts the next supervisor.
    fn start(&mut self) -> Result<(), u8> {
        self.due = None;
        let started = message::pair().and_then(|(near, far)| {
            let role = Role {
                line: far.as_raw_fd(),
                leash: self.leash.as_raw_fd(),
                keeper: std::process::id(),
                reign: self.reign,
                stops: self.stops,
                job: self.job,
                is_check: false,
                name: self.program.clone(),
            };
            start::supervisor(&role, &far, self.binary.as_ref(), &self.held_back)
                .map(|pid| (pid, near))
        });
        match started {
            Ok((pid, line)) => {
                self.reign += 1;
                for (pid, status) in &self.ended {
                    tell(
                        &line,
                        Kind::Ended,
                        pid.cast_unsigned(),
                        u64::from(status.cast_unsigned()),
                    );
                }
                let since = Instant::now();
                let (is_running, is_ending, over, successor) = (false, false, None, None);
                self.supervisor =
                    Some(Supervisor { pid, line, since, is_running, is_ending, over, successor });
                Ok(())
            }
            Err(error) if self.take_back_upgrade() => {
                crate::say!("testudo: the new program cannot be run: {error}");
                Ok(())
            }
            Err(error) => self.died(false, &format!("it cannot be started: {error}")),
        }
    }

    /// Waits for a signal, a word of the supervisor, or the time of what is due.
    fn wait(&self) {
        let entry = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let line = self.supervisor.as_ref().map_or(-1, |supervisor| supervisor.line.as_raw_fd());
        let mut polled = [entry(self.signals.as_raw_fd()), entry(line)];
        let trial = self.supervisor.as_ref().filter(|s| self.before.is_some() && !s.is_running);
        let until = self.due.into_iter().chain(trial.map(|supervisor| supervisor.since + UPGRADE));
        let left = until.min().map(|until| until.saturating_duration_since(Instant::now()));
        let millis = left
            .map_or(-1, |left| i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        // SAFETY: two valid entries; one without a descriptor is passed over.
        unsafe { libc::poll(polled.as_mut_ptr(), 2, millis) };
    }

    /// Counts what asks the job to end, and passes it on.
    fn take_signals(&mut self) {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: info has room for one record, and is read only when one was written.
        while unsafe { libc::read(self.signals.as_raw_fd(), info.as_mut_ptr().cast(), size) }
            == size.cast_signed()
        {
            // SAFETY: as above.
            let signal = unsafe { info.assume_init() }.ssi_signo.cast_signed();
            if signal != libc::SIGCHLD {
                self.stops += 1;
                if let Some(supervisor) = &self.supervisor {
                    tell(&supervisor.line, Kind::Stops, self.stops, 0);
                }
            }
        }
    }

    /// Takes in all that the supervisor has said.
    fn hear(&mut self) {
        while let Some(supervisor) = &self.supervisor
            && message::is_readable(&supervisor.line)
        {
            match message::receive(supervisor.line.as_raw_fd(), false) {
                Ok(Heard::Packet(packet)) => self.obey(packet),
                Ok(Heard::Nothing) => {}
                // Its end is seen where it is waited for.
                Ok(Heard::End) | Err(_) => return,
            }
        }
    }

    fn obey(&mut self, packet: Received) {
        let Some(supervisor) = &mut self.supervisor else { return };
        match packet.kind {
            Kind::Release => {
                self.held.clear();
                (self.job, self.refused) = (None, 0);
                self.store.iter_mut().for_each(Store::forget);
            }
            Kind::Hold => {
                for (fd, number) in packet.fds.into_iter().zip(numbers(&packet.text)) {
                    match hold(&fd, number) {
                        Ok(held) => self.held.push(held),
                        Err(error) => {
                            let code = error.raw_os_error().unwrap_or(libc::EBADF);
                            self.refused = code.cast_unsigned();
                        }
                    }
                }
            }
            Kind::Begun => {
                let chronicle = numbers(&packet.text).next().unwrap_or(-1);
                if self.refused == 0 {
                    let (control, control_bytes) = (packet.a.cast_signed(), packet.b as usize);
                    self.job = Some(Job { control, control_bytes, chronicle });
                }
                tell(&supervisor.line, Kind::Held, self.refused, 0);
            }
            Kind::Running => {
                supervisor.is_running = true;
                self.before = None;
                self.killed = 0;
                self.store_all();
            }
            Kind::Ending => supervisor.is_ending = true,
            Kind::Over => supervisor.over = Some(packet.a as u8),
            Kind::Upgrade => supervisor.successor = Some(packet.text),
            Kind::Held | Kind::Stops | Kind::Ended => {}
        }
    }

    /// Has the service manager keep what is held, and not there yet.
    fn store_all(&mut self) {
        if let (Some(store), Some(job)) = (&mut self.store, &self.job)
            && let Err(error) = store.keep(&self.held, job)
        {
            crate::say!("testudo: the service manager does not keep the job's memory: {error}");
            self.store = None;
        }
    }

    /// Waits for all that has ended; the exit code, once the job is over.
    fn reap(&mut self) -> Option<u8> {
        loop {
            let mut status = 0;
            // SAFETY: status is a valid place for the result.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return None;
            }
            if self.supervisor.as_ref().is_some_and(|supervisor| supervisor.pid == pid) {
                // What it said last.
                self.hear();
                if let Some(code) = self.supervisor.take().and_then(|s| self.ended(s, status)) {
                    return Some(code);
                }
                continue;
            }
            if let Some(supervisor) = &self.supervisor {
                let status = u64::from(status.cast_unsigned());
                tell(&supervisor.line, Kind::Ended, pid.cast_unsigned(), status);
            }
            self.ended.push_back((pid, status));
            if self.ended.len() > ENDED_MAX {
                self.ended.pop_front();
            }
        }
    }

    /// The supervisor has ended: the exit code, if the job has ended with it.
    fn ended(&mut self, supervisor: Supervisor, status: i32) -> Option<u8> {
        if supervisor.over.is_some() {
            return supervisor.over;
        }
        let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status) as u8);
        if let Some(code) = code
            && (self.job.is_none() || supervisor.is_ending)
            && self.before.is_none()
        {
            return Some(code);
        }
        if self.job.is_none() {
            // It had handed over a part at most, and started no worker: the job begins afresh.
            self.held.clear();
            self.refused = 0;
        }
        if let Some(binary) = supervisor.successor {
            self.try_upgrade(&binary);
            return None;
        }
        let signal = libc::WTERMSIG(status);
        let how =
            code.map_or_else(|| format!("signal {signal}"), |code| format!("exit code {code}"));
        if self.take_back_upgrade() {
            crate::say!(
                "testudo: the new program did not take the job over ({how}); the old one does"
            );
            return None;
        }
        let is_killed = code.is_none() && signal == libc::SIGKILL;
        if supervisor.is_running && (is_killed || supervisor.since.elapsed() > SOUND) {
            (self.deaths, self.killed) = (0, 0);
        }
        self.died(is_killed, &how).err()
    }

    /// Counts a death and says when the next supervisor is due; the exit code when there were too
    /// many.
    fn died(&mut self, is_killed: bool, how: &str) -> Result<(), u8> {
        *(if is_killed { &mut self.killed } else { &mut self.deaths }) += 1;
        let in_a_row = self.deaths + self.killed;
        if self.deaths > BUDGET || self.killed > BUDGET_KILLED {
            let error = Error::Supervisor { deaths: in_a_row, cause: how.into() };
            crate::say!("{}: {error}", self.program);
            return Err(error.exit_code());
        }
        let pause = PAUSE * (1 << in_a_row.min(16));
        let pause = if in_a_row > 1 { pause.min(PAUSE_MAX) } else { Duration::ZERO };
        self.due = Some(Instant::now() + pause);
        Ok(())
    }

    /// The supervisor has left for another program to follow it.
    fn try_upgrade(&mut self, binary: &[u8]) {
        match open_program(binary) {
            Ok(binary) => self.before = Some(self.binary.replace(binary)),
            Err(error) => {
                let path = String::from_utf8_lossy(binary);
                crate::say!("testudo: {path} cannot be opened: {error}; the old program goes on");
            }
        }
        self.due = Some(Instant::now());
    }

    /// Goes back to the program before the one that is on trial, if one is.
    fn take_back_upgrade(&mut self) -> bool {
        let Some(before) = self.before.take() else { return false };
        self.binary = before;
        self.due = Some(Instant::now());
        true
    }

    /// Ends a supervisor of another program that does not take the job over in time.
    fn judge_upgrade(&self) {
        if let (Some(_), Some(supervisor)) = (&self.before, &self.supervisor)
            && !supervisor.is_running
            && supervisor.since.elapsed() > UPGRADE
        {
            // SAFETY: plain system call; the child was not waited for, so the number is its own.
            unsafe { libc::kill(supervisor.pid, libc::SIGKILL) };
        }
    }

    /// Lets go of the leash and waits until all processes of the job have ended; for a bounded
    /// time, though nothing but a stuck kernel makes it long.
    fn end(&mut self, code: u8) -> u8 {
        self.grip = None;
        self.store.iter_mut().for_each(Store::forget);
        let until = Instant::now() + LEAVING;
        loop {
            // SAFETY: the status is not asked for.
            let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
            if pid < 0 || (pid == 0 && (!has_workers() || Instant::now() > until)) {
                return code;
            }
            if pid == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// A reign that no earlier keeper of the job had: they count from 0, or from when they started.
fn later_reign() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |since| since.as_secs() as u32)
}

/// Says something to the supervisor, if it has room for it: a line that nobody empties belongs to
/// one that is stopped or about to die.
fn tell(line: &OwnedFd, kind: Kind, a: u32, b: u64) {
    let _ = message::send(line.as_raw_fd(), Packet::new(kind, a, b), false);
}

/// The descriptors' numbers in a packet's text.
fn numbers(text: &[u8]) -> impl Iterator<Item = RawFd> {
    text.chunks_exact(size_of::<RawFd>()).map(|bytes| {
        let mut number = [0; size_of::<RawFd>()];
        number.copy_from_slice(bytes);
        RawFd::from_ne_bytes(number)
    })
}

/// Takes a descriptor under a number of its own, which supervisors inherit.
fn hold(fd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    if number < line::BASE {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: plain system call on an open descriptor; the result is checked, and ours.
    let held = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD, number) };
    if held < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let held = unsafe { OwnedFd::from_raw_fd(held) };
    // The launcher left something open there: no supervisor could have it under this number.
    if held.as_raw_fd() == number {
        Ok(held)
    } else {
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }
}

/// Opens a program to be run later, whatever becomes of its path.
fn open_program(path: &[u8]) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::OpenOptionsExt;
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(path));
    let mut options = std::fs::OpenOptions::new();
    Ok(options.read(true).custom_flags(libc::O_PATH).open(path)?.into())
}

/// The signals that ask a job to end. A launcher that has it ignore hang-ups (nohup) is obeyed.
fn passed_on() -> Vec<libc::c_int> {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: now is a valid place for the result, which is read only when it was written.
    let ignores_hang_up = unsafe {
        libc::sigaction(libc::SIGHUP, std::ptr::null(), now.as_mut_ptr()) == 0
            && now.assume_init().sa_sigaction == libc::SIG_IGN
    };
    let mut signals = vec![libc::SIGINT, libc::SIGTERM];
    if !ignores_hang_up {
        signals.push(libc::SIGHUP);
    }
    signals
}

/// Blocks signals and ends of children in this thread and gives a descriptor that reads them.
fn signal_fd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is initialised before it is used; a child's end must not be ignored, or none
    // can be waited for.
    let fd = unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals.iter().chain(&[libc::SIGCHLD]) {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just returned by the kernel.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a process of a job is among this process's children. One that is about to end has no
/// name any more.
fn has_workers() -> bool {
    !named_children(std::process::id(), |name| name.is_empty() || is_ours(name)).is_empty()
}

/// The processes of a job that are children of `parent`.
pub(crate) fn children_of(parent: u32) -> Vec<i32> {
    named_children(parent, is_ours)
}

/// Whether that is the name that a process of a job was started under.
fn is_ours(name: &[u8]) -> bool {
    name.starts_with(b"testudo-")
}

fn named_children(parent: u32, is_meant: impl Fn(&[u8]) -> bool) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        crate::keeper::parent_of(*pid) == Some(parent)
            && std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|name| is_meant(&name))
    })
    .collect()
}

/// The launched process of the job that this process leads.
pub(crate) fn job() -> u32 {
    line().map_or_else(std::process::id, |line| line.role().keeper)
}

/// The launched process of the job that a process leads: the one to be signalled.
pub(crate) fn job_of(pid: u32) -> u32 {
    let is_supervisor = std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.starts_with(b"testudo-sup\0"));
    let parent = is_supervisor.then(|| parent_of(pid.cast_signed())).flatten();
    parent.unwrap_or(pid)
}

/// When this process started, as `stat` has it.
pub(crate) fn own_start() -> u64 {
    static START: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *START.get_or_init(|| stat("self").map_or(0, |(_, started)| started))
}

/// Parent and start time (in clock ticks since the machine started) of a process.
pub(crate) fn stat(pid: &str) -> Option<(u32, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    Some((parent, fields.nth(17)?.parse().ok()?))
}

fn parent_of(pid: i32) -> Option<u32> {
    Some(stat(&pid.to_string())?.0)
}
