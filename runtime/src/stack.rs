//! The main thread's stack, on which jobs are described and workers run. Where its limit is lower
//! than that needs, it is raised; a job that would overflow it is refused instead.
//!
//! Called by `cli` before anything else: the kernel looks at the limit whenever the stack grows.

#![expect(unsafe_code, reason = "reads and raises a limit of this process")]

use crate::error::Error;

/// What a job's own code and the engine's need at least.
const LEAST: libc::rlim_t = 1 << 20;
/// What it is raised to, if it may be.
const USUAL: libc::rlim_t = 8 << 20;

/// Makes sure that the stack may grow as far as a job needs.
pub(crate) fn ensure() -> Result<(), Error> {
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
        "the stack is limited to {now} KiB (ulimit -s); a job needs {least} KiB"
    )))
}
