//! Limits that a shell sets and that would end a process without a word: the main thread's stack,
//! on which jobs are described and workers run, and the size of files.
//!
//! Where the stack's limit is lower than is needed, it is raised; a job that would overflow it is
//! refused instead. Called by `init` and `tool` before anything else, in functions that are small
//! themselves: the kernel looks at the limit whenever the stack grows.

#![expect(unsafe_code, reason = "reads and raises limits of this process")]

use crate::error::Error;

/// What a job's own code and the engine's need at least.
const LEAST: libc::rlim_t = 1 << 20;
/// What it is raised to, if it may be.
const USUAL: libc::rlim_t = 8 << 20;

/// Makes sure that the stack may grow as far as a job needs.
fn ensure_stack() -> Result<(), Error> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one rlimit.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_STACK, &raw mut limit) };
    if got != 0 || limit.rlim_cur >= LEAST {
        return Ok(());
    }
    let hard = limit.rlim_max.max(limit.rlim_cur);
    let raised = |max: libc::rlim_t| {
        let wanted = libc::rlimit { rlim_cur: USUAL.min(max), rlim_max: max };
        // SAFETY: reads one rlimit.
        unsafe { libc::setrlimit(libc::RLIMIT_STACK, &raw const wanted) == 0 }
    };
    // Who may raise the hard limit as well is root.
    if (hard >= LEAST && raised(hard)) || raised(USUAL) {
        return Ok(());
    }
    let (now, least) = (limit.rlim_cur >> 10, LEAST >> 10);
    Err(Error::Machine(format!(
        "the stack is limited to {now} KiB (ulimit -s); a job needs {least} KiB: \
         ulimit -s {}",
        USUAL >> 10
    )))
}

/// The same, ending the process where that is refused.
pub(crate) fn ensure_stack_or_exit(program: &str) {
    if let Err(error) = ensure_stack() {
        crate::say!("{program}: {error}");
        std::process::exit(i32::from(error.exit_code()));
    }
}

/// A file that may not grow (`ulimit -f`) is an error with a text from here on, not a signal.
pub(crate) fn refuse_long_files() {
    // SAFETY: plain system call.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
