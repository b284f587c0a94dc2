//! A disk without io_uring: a helper thread makes the calls, one after the other, so that the data
//! thread never waits. Same operations, same results; less speed.
//!
//! Invariants: at most [`DEPTH_MAX`] jobs are in flight, and both channels have room for all of
//! them, so that neither side ever waits to send. Dropping it waits for what is in flight.
//!
//! Called through [`super::Disk`].

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::files::Files;
use super::job::{Call, Finished, Job, Next};
use super::{DEPTH_MAX, Disk, Disturbance, Done, Op, Ticket, list_folder};

/// The disk and its helper thread.
#[derive(Debug)]
pub struct Threaded {
    files: Files,
    submitted: u64,
    in_flight: usize,
    /// None only while dropping.
    jobs: Option<SyncSender<Job>>,
    finished: Receiver<Finished>,
    /// Refused on submission, or found by `wait`: given out by the next poll.
    ready: VecDeque<Done>,
    helper: Option<JoinHandle<()>>,
}

impl Threaded {
    /// Starts the helper thread.
    pub fn new() -> io::Result<Self> {
        Self::disturbed(Disturbance::default())
    }

    /// As [`Threaded::new`], with a kernel that makes difficulties: for tests.
    pub fn disturbed(disturbance: Disturbance) -> io::Result<Self> {
        let (jobs, jobs_of_helper) = sync_channel::<Job>(DEPTH_MAX);
        let (finished_of_helper, finished) = sync_channel(DEPTH_MAX);
        let work = move || {
            let mut disturbance = disturbance;
            for job in jobs_of_helper {
                if finished_of_helper.send(run(job, &mut disturbance)).is_err() {
                    break;
                }
            }
        };
        let helper = thread::Builder::new().name("testudo-disk".into()).spawn(work)?;
        Ok(Self {
            files: Files::default(),
            submitted: 0,
            in_flight: 0,
            jobs: Some(jobs),
            finished,
            ready: VecDeque::new(),
            helper: Some(helper),
        })
    }
}

/// All the calls of a job.
fn run(mut job: Job, disturbance: &mut Disturbance) -> Finished {
    loop {
        let is_repeatable = job.is_repeatable();
        let result = make(job.call(disturbance.most()));
        match job.advance(disturbance.result(is_repeatable, result)) {
            Next::Call(again) => job = again,
            Next::End(finished) => return finished,
        }
    }
}

/// Makes a call; the result is as io_uring gives it.
fn make(call: Call) -> i32 {
    // SAFETY: paths, buffers and descriptors in a call are valid while its job lives, which is
    // until this returns; a buffer is the job's alone.
    let result: libc::ssize_t = unsafe {
        match call {
            Call::Open { path, flags } => libc::open(path, flags, 0o600) as _,
            Call::Reserve { fd, bytes } => libc::fallocate(fd, 0, 0, bytes as libc::off_t) as _,
            Call::Write { fd, from, bytes, at } => {
                libc::pwrite(fd, from.cast(), bytes as usize, at as libc::off_t)
            }
            Call::Read { fd, into, bytes, at } => {
                libc::pread(fd, into.cast(), bytes as usize, at as libc::off_t)
            }
            Call::Sync { fd } => libc::fsync(fd) as _,
            Call::Close { fd } => libc::close(fd) as _,
            Call::Rename { from, to } => libc::rename(from, to) as _,
            Call::Unlink { path } => libc::unlink(path) as _,
        }
    };
    if result < 0 {
        -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
    } else {
        // At most a buffer's length or a descriptor.
        result as i32
    }
}

impl Disk for Threaded {
    fn submit(&mut self, op: Op) -> Result<Ticket, Op> {
        if self.in_flight >= DEPTH_MAX {
            return Err(op);
        }
        self.submitted += 1;
        let ticket = Ticket(self.submitted);
        let job = Job::new(ticket, op, &mut self.files);
        self.in_flight += 1;
        match job {
            Ok(job) => {
                let jobs = self.jobs.as_ref().expect("open until dropped");
                jobs.try_send(job).expect("the helper lives, and the channel has room for all");
            }
            Err(done) => self.ready.push_back(done),
        }
        Ok(ticket)
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        if self.in_flight == 0 {
            return;
        }
        let before = done.len();
        done.extend(self.ready.drain(..));
        while let Ok(finished) = self.finished.try_recv() {
            done.push(finished.done(&mut self.files));
        }
        self.in_flight -= done.len() - before;
    }

    fn wait(&mut self, patience: Duration) {
        if self.in_flight == 0 || !self.ready.is_empty() {
            return;
        }
        if let Ok(finished) = self.finished.recv_timeout(patience) {
            self.ready.push_back(finished.done(&mut self.files));
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<(String, u64)>> {
        list_folder(folder)
    }

    fn kind(&self) -> &'static str {
        "pwrite"
    }
}

impl Drop for Threaded {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(helper) = self.helper.take() {
            // It drops the buffers of its jobs; a panic of it was printed.
            let _ = helper.join();
        }
    }
}
