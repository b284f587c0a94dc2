//! Who a process of a job is: the keeper, unless its environment says that it is a supervisor (or a
//! worker, see `worker::entry`).
//!
//! Invariant: the variable is taken out of the environment before any of the job's code runs, so
//! that a program started by that code is not mistaken for a supervisor.
//!
//! Called by `testudo::main`; written by the keeper.

#![expect(unsafe_code, reason = "takes a variable out of the environment")]

/// The environment variable that makes a process a supervisor:
/// `LINE:LEASH:KEEPER:REIGN:STOPS:CONTROL_FD:CONTROL_BYTES:CHRONICLE_FD:CHECK:NAME`.
pub(crate) const SUPERVISOR: &str = "TESTUDO_SUPERVISOR";

/// What the keeper told this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Role {
    /// The socket to the keeper.
    pub(crate) line: i32,
    /// The pipe that ends when the keeper does.
    pub(crate) leash: i32,
    /// The keeper's process.
    pub(crate) keeper: u32,
    /// How many supervisors the job had before.
    pub(crate) reign: u32,
    /// Signals that have asked the job to end so far.
    pub(crate) stops: u32,
    /// The control segment of the job that is there already, and the chronicle.
    pub(crate) job: Option<Job>,
    /// It only says whether it plans the same job.
    pub(crate) is_check: bool,
    /// What the program was called.
    pub(crate) name: String,
}

/// The segments that a supervisor finds the rest by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) control: i32,
    pub(crate) control_bytes: usize,
    pub(crate) chronicle: i32,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { line, leash, keeper, reign, stops, job, is_check, name } = self;
        let none = Job { control: -1, control_bytes: 0, chronicle: -1 };
        let Job { control, control_bytes, chronicle } = job.unwrap_or(none);
        let check = u8::from(*is_check);
        write!(f, "{line}:{leash}:{keeper}:{reign}:{stops}:")?;
        write!(f, "{control}:{control_bytes}:{chronicle}:{check}:{name}")
    }
}

/// The role that a text gives, if it is one.
fn parse(text: &str) -> Option<Role> {
    fn next<T: std::str::FromStr>(parts: &mut std::str::SplitN<'_, char>) -> Option<T> {
        parts.next()?.parse().ok()
    }
    let parts = &mut text.splitn(10, ':');
    let (line, leash, keeper) = (next(parts)?, next(parts)?, next(parts)?);
    let (reign, stops) = (next(parts)?, next(parts)?);
    let job = Job { control: next(parts)?, control_bytes: next(parts)?, chronicle: next(parts)? };
    let is_check = parts.next()? == "1";
    let name = parts.next()?.to_owned();
    let job = (job.control >= 0).then_some(job);
    Some(Role { line, leash, keeper, reign, stops, job, is_check, name })
}

/// Takes the role out of the environment; `None` for the launched process.
pub(crate) fn take() -> Option<Role> {
    let text = std::env::var(SUPERVISOR).ok()?;
    // SAFETY: the first thing in the main of a process that the keeper has started; a program that
    // has started threads before `testudo::main` must not read the environment in them meanwhile.
    unsafe { std::env::remove_var(SUPERVISOR) };
    parse(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_reads_as_it_was_written() {
        let job = Job { control: 64, control_bytes: 1 << 40, chronicle: 65 };
        for job in [None, Some(job)] {
            let role = Role {
                line: 5,
                leash: 4,
                keeper: 77,
                reign: 3,
                stops: 1,
                job,
                is_check: job.is_none(),
                name: "a:b c".into(),
            };
            assert_eq!(parse(&role.to_string()), Some(role));
        }
        assert_eq!(parse("1:2:3"), None);
        assert_eq!(parse(""), None);
    }
}
