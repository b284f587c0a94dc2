//! Where a worker process begins: the same binary, started again by the supervisor with a few words
//! in its environment.
//!
//! Invariants: nothing of the user's runs before the role is known, but what stands before
//! `testudo::init()` in main; the parent's death ends the worker (checked again after the signal is
//! set, to close the race).
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
use crate::supervisor::description::Description;
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;

/// The environment variable that makes a process a worker:
/// `INDEX:CONTROL_FD:CONTROL_BYTES:ENTRY:LIFE:HASTE:SMALL_PAGES`.
pub(crate) const ROLE: &str = "TESTUDO_WORKER";

/// Exit code of a worker whose job failed for a reason that a restart does not mend.
pub(crate) const EXIT_FAILED: i32 = 70;

/// Exit code of a worker that could not attach.
pub(crate) const EXIT_ATTACH: i32 = 71;

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
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { worker, control_fd, control_bytes, entry, life, in_haste, small_pages } = self;
        let flags = (u8::from(*in_haste), u8::from(*small_pages));
        write!(f, "{worker}:{control_fd}:{control_bytes}:{entry}:{life}:{}:{}", flags.0, flags.1)
    }
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
pub(crate) fn run(role: Role, build: impl FnOnce(&Flow, &str)) -> ! {
    let code = match work(role, build) {
        Ok(()) => 0,
        Err(error) => {
            crate::say!("testudo-w{}: {error}", role.worker);
            // Another process of the same binary plans the same.
            if matches!(error, Error::Plan(_)) { EXIT_FAILED } else { EXIT_ATTACH }
        }
    };
    std::process::exit(code)
}

fn work(role: Role, build: impl FnOnce(&Flow, &str)) -> Result<(), Error> {
    settle(&role);
    if role.in_haste {
        crate::haste::inherited();
    }
    crate::testing::arm(role.worker, role.life);
    // SAFETY: the supervisor left this descriptor open for us; nothing else in this process knows
    // it.
    let control = unsafe { OwnedFd::from_raw_fd(role.control_fd) };
    let (description, control) = Description::read(control, role.control_bytes)?;
    if description.supervisor != std::os::unix::process::parent_id() {
        return Err(Error::Machine("the supervisor is gone".into()));
    }
    let settings = Rc::new(description.settings.clone());
    let flow = Flow::with_surveys(Rc::clone(&settings), description.surveys.clone());
    build(&flow, &description.parameters);
    let (worker, stages) = Attach::worker(role, &description, control, &flow)?;
    step::run(worker, stages, role.in_haste)
}

/// Makes this process what a worker should be: named, deaf to the terminal's signals, and gone with
/// its parent.
fn settle(role: &Role) {
    let name = std::ffi::CString::new(format!("testudo-w{}", role.worker)).unwrap_or_default();
    // SAFETY: plain system calls; name outlives them.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        for signal in IGNORED {
            libc::signal(signal, libc::SIG_IGN);
        }
        // A file that may not grow is then an error with a text.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut held = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(held.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, held.as_ptr(), std::ptr::null_mut());
        if role.small_pages {
            libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0);
        }
    }
}
