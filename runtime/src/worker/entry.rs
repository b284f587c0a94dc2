//! Where a worker process begins: the same binary, started again by the supervisor with a few words
//! in its environment.
//!
//! Invariants: nothing of the user's runs before the role is known, but what stands before
//! `testudo::init()` in main; the keeper's death ends the worker (`keeper::leash`), or in a job
//! inside another program the parent's (checked again after the signal is set, to close the race).
//!
//! Called by `testudo::init` and `testudo::main`.

#![expect(
    unsafe_code,
    reason = "process entry: signals, inherited descriptors, the job's function"
)]

use super::attach::Attach;
use super::step;
use crate::error::Error;
use crate::flow::Flow;
use crate::keeper::leash::{self, Tie};
use crate::supervisor::description::Description;
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;
use testudo_shm::death;
use testudo_shm::header::{ControlHeader, WorkerHeader};
use testudo_shm::primitive::{AtomicBool, Ordering, fence};
use testudo_shm::standby::Seat;

/// The environment variable that makes a process a worker:
/// `INDEX:CONTROL_FD:CONTROL_BYTES:ENTRY:LIFE:HASTE:SMALL_PAGES:STANDBY:TIE:SUCCESSION`; STANDBY is
/// `-`, or number and descriptor of a standby's seat; SUCCESSION is -1 or the descriptor of a
/// successor that is prepared while the worker runs.
pub(crate) const ROLE: &str = "TESTUDO_WORKER";

/// Exit code of a worker whose job failed for a reason that a restart does not mend.
pub(crate) const EXIT_FAILED: i32 = 70;

/// Exit code of a worker that could not attach.
pub(crate) const EXIT_ATTACH: i32 = 71;

/// Exit code of a worker whose segment cannot be claimed because its claim word is damaged.
pub(crate) const EXIT_UNSOUND: i32 = 72;

/// Signals of the terminal and of service managers, which are the supervisor's to act on. Workers
/// are spawned with them held back.
pub(crate) const IGNORED: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// What the supervisor told this process to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Role {
    pub(crate) worker: usize,
    pub(crate) control_fd: i32,
    pub(crate) control_bytes: usize,
    /// Offset of the job's function from a fixed one; 0 when `testudo::main` knows the job.
    pub(crate) entry: isize,
    /// How many processes were this worker before.
    pub(crate) life: u64,
    /// It inherited a raised priority, to be given up after the first step.
    pub(crate) in_haste: bool,
    /// Huge pages are turned off for its start.
    pub(crate) small_pages: bool,
    /// It stands by for other workers, until one of them dies.
    pub(crate) standby: Option<Seat>,
    /// The worker runs: this process is prepared and waits for its turn, and says so here.
    pub(crate) succession: Option<i32>,
    /// What ends it, where that is not the end of its parent.
    pub(crate) tie: Option<Tie>,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { worker, control_fd, control_bytes, entry, life, .. } = self;
        let flags = (u8::from(self.in_haste), u8::from(self.small_pages));
        write!(f, "{worker}:{control_fd}:{control_bytes}:{entry}:{life}:{}:{}:", flags.0, flags.1)?;
        match self.standby {
            None => f.write_str("-:")?,
            Some(Seat { index, fd }) => write!(f, "{index}.{fd}:")?,
        }
        f.write_str(&Tie::word(self.tie))?;
        write!(f, ":{}", self.succession.unwrap_or(-1))
    }
}

impl Role {
    /// What ps and top show.
    pub(crate) fn name(&self) -> String {
        match self.standby {
            None => format!("testudo-w{}", self.worker),
            Some(seat) => format!("testudo-s{}", seat.index),
        }
    }
}

fn seat(text: &str) -> Option<Seat> {
    let (index, fd) = text.split_once('.')?;
    Some(Seat { index: index.parse().ok()?, fd: fd.parse().ok()? })
}

/// The role that the environment gives, if any.
pub(crate) fn role() -> Option<Role> {
    let text = std::env::var(ROLE).ok()?;
    let mut parts = text.split(':');
    let role = Role {
        worker: parts.next()?.parse().ok()?,
        control_fd: parts.next()?.parse().ok()?,
        control_bytes: parts.next()?.parse().ok()?,
        entry: parts.next()?.parse().ok()?,
        life: parts.next()?.parse().ok()?,
        in_haste: parts.next()? == "1",
        small_pages: parts.next()? == "1",
        standby: seat(parts.next()?),
        tie: Tie::parse(parts.next()?),
        succession: parts.next()?.parse().ok().filter(|fd| *fd >= 0),
    };
    Some(role)
}

/// A job's function as it can be named in another process of the same binary.
pub(crate) type JobFn = fn(&Flow, &str);

/// The distance of a job's function from [`ANCHOR`]: the same in every process of the binary.
pub(crate) fn entry_offset(job: JobFn) -> isize {
    (job as usize).wrapping_sub((&raw const ANCHOR).addr()).cast_signed()
}

/// A fixed place in the executable. No function: the compiler may copy a small one into every crate
/// that leads to it, and the copies have other addresses.
static ANCHOR: u8 = 0;

/// The job's function behind an offset.
pub(crate) fn job_at(entry: isize) -> JobFn {
    let address = (&raw const ANCHOR).addr().wrapping_add_signed(entry);
    // SAFETY: the offset was made by `entry_offset` in the process that spawned this one from the
    // same executable (/proc/self/exe), so it leads to a function of that type.
    unsafe { std::mem::transmute::<usize, JobFn>(address) }
}

/// Runs this process as a worker and exits.
pub(crate) fn run(role: Role, build: impl Fn(&Flow, &str)) -> ! {
    let code = match work(role, build) {
        Ok(()) => 0,
        Err(error) => {
            if let Some(fd) = role.succession {
                // Whoever asked for a successor hears it; the worker goes on.
                super::successor::refuse(fd, &error);
                std::process::exit(EXIT_ATTACH);
            }
            crate::say!("{}: {error}", role.name());
            match error {
                // Another process of the same binary plans the same.
                Error::Plan(_) => EXIT_FAILED,
                Error::Unsound(_) => EXIT_UNSOUND,
                _ => EXIT_ATTACH,
            }
        }
    };
    std::process::exit(code)
}

fn work(role: Role, build: impl Fn(&Flow, &str)) -> Result<(), Error> {
    settle(&role);
    replace_closed_streams();
    if role.tie.is_some_and(|tie| !leash::tie(tie)) {
        return Err(Error::Machine("the job's keeper is gone".into()));
    }
    if role.in_haste {
        crate::haste::inherited();
        if role.succession.is_some() {
            crate::haste::end();
        }
    }
    if let Some(tie) = role.tie {
        crate::testing::tied_to(tie.keeper);
    }
    match (role.succession, role.standby) {
        (None, None) => crate::testing::arm(role.worker, role.life),
        (Some(_), _) => crate::testing::arm_successor(role.worker),
        // Its start must not take a turn from a worker.
        (None, Some(_)) if role.in_haste => crate::haste::end(),
        (None, Some(_)) => {}
    }
    // SAFETY: the supervisor left this descriptor open for us; nothing else in this process knows
    // it.
    let control = unsafe { OwnedFd::from_raw_fd(role.control_fd) };
    let (description, control) = Description::read(control, role.control_bytes)?;
    let description = description.of_worker(role.worker);
    if description.settings.huge_pages {
        // What is touched before would stay in small ones.
        allow_huge_pages();
    }
    if role.tie.is_none() && description.supervisor != std::os::unix::process::parent_id() {
        return Err(Error::Machine("the supervisor is gone".into()));
    }
    let settings = Rc::new(description.settings.clone());
    let drawn = || {
        let flow = Flow::with_surveys(Rc::clone(&settings), description.surveys.clone());
        build(&flow, &description.parameters);
        flow
    };
    let flow = drawn();
    let (worker, stages) = Attach::worker(role, &description, control, &flow, &drawn)?;
    step::run(worker, stages, role.in_haste || role.standby.is_some())
}

/// Time between two looks at the standard streams.
const STREAMS_NS: u64 = 100_000_000;

/// Standard output and error as user code of a worker may write to them. Printing to one whose
/// reader is gone panics: such a stream is replaced by one that takes everything.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    next_ns: u64,
}

impl Streams {
    /// Looks, if it is time to.
    #[inline]
    pub(crate) fn look(&mut self, now_ns: u64) {
        if now_ns >= self.next_ns {
            self.next_ns = now_ns + STREAMS_NS;
            replace_closed_streams();
        }
    }
}

#[cold]
fn replace_closed_streams() {
    let mut streams = [1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: two valid entries; a poll without a wait.
    unsafe { libc::poll(streams.as_mut_ptr(), 2, 0) };
    for stream in streams.iter().filter(|s| s.revents & (libc::POLLERR | libc::POLLHUP) != 0) {
        // SAFETY: plain system calls; what is opened is closed again.
        unsafe {
            let null = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if null >= 0 {
                libc::dup2(null, stream.fd);
                libc::close(null);
            }
        }
    }
}

/// The segment is ours, but perhaps not for us: a worker of an earlier supervisor, which the
/// present one may not know of, gives it up again before it has touched anything and leaves (R2).
pub(crate) fn give_way(role: &Role, own: &WorkerHeader, control: &ControlHeader) {
    // SYNC reign: pairs with the fence in `Crew::adopt`. Either this sees the new reign, or the new
    // supervisor sees the claim.
    fence(Ordering::SeqCst);
    let is_stale = |tie: Tie| control.reign.load(Ordering::Acquire) != tie.reign;
    if role.tie.is_some_and(is_stale) {
        death::release(own);
        std::process::exit(EXIT_ATTACH);
    }
}

/// Makes this process what a worker should be: named, deaf to the terminal's signals, and gone with
/// its parent where no keeper ends it.
fn settle(role: &Role) {
    let name = std::ffi::CString::new(role.name()).unwrap_or_default();
    // SAFETY: plain system calls; name outlives them.
    unsafe {
        if role.tie.is_none() {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        }
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        for signal in IGNORED {
            libc::signal(signal, libc::SIG_IGN);
        }
        let mut held = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(held.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, held.as_ptr(), std::ptr::null_mut());
    }
    OWED.store(role.small_pages, Ordering::Relaxed);
    // Nobody waits for the first process of a worker.
    if role.life == 0 && role.standby.is_none() && role.succession.is_none() {
        allow_huge_pages();
    }
}

/// Huge pages are turned off, and were not before this process was started.
static OWED: AtomicBool = AtomicBool::new(false);

/// Turns huge pages on again that were turned off for the start. To zero one for the heap takes
/// 0.1 ms, and where memory has to be compacted for it 5: not before others wait no more.
pub(crate) fn allow_huge_pages() {
    if OWED.swap(false, Ordering::Relaxed) {
        // SAFETY: a plain system call about this process.
        unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0) };
    }
}
