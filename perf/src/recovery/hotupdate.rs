//! Replacing a worker between two steps, as `testudo restart` and each worker's part of `testudo
//! update` do: from the last commit of the old process to the first of the new one.
//!
//! The job's control socket is asked, as the tool asks it. What the successor does before the
//! worker gives way (starting, mapping, bringing pages in) is not in these figures, since the
//! worker goes on meanwhile; what it takes of the machine shows in the gaps of the others.
//!
//! Called through `means`.

use super::{Recovery, longest_gap, wait_until};
use crate::report::Failure;
use std::time::Duration;
use testudo::control::client;
use testudo::control::folder::candidates;
use testudo::control::protocol::{Reply, Request};
use testudo::supervisor::launch::{Running, View};
use testudo_shm::primitive::Ordering;

/// The job's name: its socket is found by it, whatever else runs.
pub(super) fn name() -> String {
    format!("perf-recovery-{}", std::process::id())
}

/// Has one worker replaced and waits until the new process commits.
pub(super) fn renew(running: &Running, view: &View, worker: usize) -> Result<Recovery, Failure> {
    let header = view.workers[worker];
    let others = view.workers.iter().enumerate().filter(|(index, _)| *index != worker);
    let others: Vec<_> =
        others.map(|(_, other)| (*other, other.gap_count.load(Ordering::Acquire))).collect();
    match client::ask(&candidates(), &name(), &Request::Restart { worker: Some(worker) }) {
        Ok(Reply::Restarted { .. }) => {}
        Ok(other) => return Err(Failure::Run(format!("the job refuses to restart: {other:?}"))),
        Err(failure) => return Err(Failure::Run(failure.to_string())),
    }
    let first_commit = || header.first_commit_ns.load(Ordering::Acquire);
    let limit = Duration::from_secs(20);
    wait_until(running, "the successor commits", limit, || first_commit() > 0)?;
    let (from, back) = (header.before_ns.load(Ordering::Acquire), first_commit());
    let goes_on = || others.iter().all(|(other, _)| other.commit_ns.load(Ordering::Acquire) > back);
    let _ = wait_until(running, "the others commit", Duration::from_millis(500), goes_on);
    let gaps = others.iter().map(|(other, seen)| longest_gap(other, *seen, from, back));
    let attached = header.attached_ns.load(Ordering::Acquire);
    Ok(Recovery {
        killed_ns: from,
        to_attached: attached.saturating_sub(from),
        to_first_commit: back.saturating_sub(from),
        others_gap: gaps.max().unwrap_or(0),
    })
}
