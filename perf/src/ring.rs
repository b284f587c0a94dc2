//! The ring alone: numbered messages from a process on one core to a process on another, each
//! summed in place.
//!
//! Two segments, one for each process, hold a ring in each direction; each process maps its own
//! writable and the other's read-only, as workers do. Batch 1 publishes every message by itself
//! before the next is written; batch 64 writes 64 messages into one frame and publishes once. The
//! round trip sends one message and waits for the answer. The receiver checks the sum of all
//! messages, so a lost, doubled or torn one fails the run.
//!
//! Called by `main`.

use crate::clock::{Clock, ticks};
use crate::regime::{self, histogram, two_cores};
use crate::report::{Failure, Line, Lines, Params};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use testudo::time::now_ns;
use testudo_shm::arena::{Access, Arena};
use testudo_shm::consumer::{Consumer, Frame};
use testudo_shm::primitive::spin_hint;
use testudo_shm::producer::Producer;
use testudo_shm::record::{Batch, Record};
use testudo_shm::ring::{RingParts, WORD_STRIDE};
use testudo_shm::segment::{PAGE, Segment};
use testudo_shm::zerocopy::{FromBytes, IntoBytes};

/// The ring.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Bytes of a message: 8, 64 or 1024 [default: all]
    #[arg(long, value_name = "BYTES")]
    bytes: Option<usize>,
    /// Messages published at once: 1 or 64 [default: both]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Bytes of ring, a power of two, at least a page and two batches
    /// [default: 1 MiB, for 1024-byte messages 4 MiB]
    #[arg(long, value_name = "BYTES")]
    ring_bytes: Option<testudo::config::Bytes>,
}

/// Spins between two looks that found something: as a worker, which looks once a step.
const SPINS_OF_A_STEP: usize = 48;

/// Round trips that are timed.
const ROUND_TRIPS: u64 = 200_000;

/// Round trips before the first measurement.
const WARM_UP: u64 = 1_000;

/// One process's ends.
struct Ends {
    producer: Producer,
    consumer: Consumer,
}

/// Both segments, as descriptors, before they are mapped.
struct Scene {
    segments: [Segment; 2],
    read_only: [OwnedFd; 2],
    capacity: usize,
}

impl Scene {
    fn new(capacity: usize) -> Result<Self, Failure> {
        let make = || Segment::create("perf-ring", PAGE + capacity);
        let segments = [make()?, make()?];
        let read_only = [segments[0].read_only()?, segments[1].read_only()?];
        Ok(Self { segments, read_only, capacity })
    }

    /// Maps both segments for process `own` and takes its ends.
    fn attach(&self, own: usize) -> Result<Ends, Failure> {
        let each = PAGE + 2 * self.capacity;
        // Mapped until the process ends: the ends point into it.
        let arena: &'static Arena = Box::leak(Box::new(Arena::reserve(2 * each)?));
        for index in 0..2 {
            let (fd, access) = if index == own {
                (self.segments[index].fd(), Access::Owner)
            } else {
                (self.read_only[index].as_fd(), Access::Peer)
            };
            arena.map(fd, 0, PAGE, index * each, access)?;
            arena.map_mirrored(fd, PAGE, self.capacity, index * each + PAGE, access)?;
        }
        let ring = |from: usize| {
            let (at, to) = (from * each, (1 - from) * each);
            // SAFETY: the first page of each segment has the two words, the data behind it is
            // mapped mirrored.
            unsafe { RingParts::at(arena.base(), at + PAGE, self.capacity, at, to + WORD_STRIDE) }
        };
        // SAFETY: the arena is leaked; each process takes its own ends, once.
        let (producer, consumer) =
            unsafe { (Producer::attach(ring(own), 0), Consumer::attach(ring(1 - own), 0)) };
        Ok(Ends { producer, consumer })
    }
}

impl Ends {
    /// Sends messages `from..from + COUNT` in one frame, each `W` words with its number, and
    /// publishes.
    #[inline(always)]
    fn send<const W: usize>(&mut self, from: u64, count: usize)
    where
        [u64; W]: FromBytes + IntoBytes,
    {
        loop {
            if let Some(mut frame) = self.producer.reserve(count * W * 8) {
                if let Ok(messages) = <[[u64; W]]>::mut_from_bytes(frame.space()) {
                    for (index, message) in messages.iter_mut().enumerate() {
                        *message = [from + index as u64; W];
                    }
                }
                frame.close(count * W * 8, count);
                break;
            }
            spin_hint();
        }
        self.producer.publish();
    }

    /// Takes everything that is published: messages, and the sum of their words.
    #[inline(always)]
    fn receive<const W: usize>(&mut self) -> Result<(u64, u64), Failure>
    where
        [u64; W]: Record<View = [u64; W]>,
    {
        let (mut count, mut sum) = (0, 0u64);
        if !self.consumer.look() {
            return match self.consumer.fault() {
                Some(fault) => Err(Failure::Wrong(fault.to_string())),
                None => Ok((0, 0)),
            };
        }
        loop {
            let at = self.consumer.position();
            let Some(Frame::Data { bytes, count: here }) = self.consumer.frame() else {
                break;
            };
            let batch = Batch::<[u64; W]>::check(bytes, here, at);
            let batch = batch.map_err(|fault| Failure::Wrong(fault.to_string()))?;
            for message in batch.as_slice().unwrap_or_default() {
                sum = message.iter().fold(sum, |sum, word| sum.wrapping_add(*word));
            }
            count += here as u64;
            self.consumer.take();
        }
        self.consumer.publish();
        Ok((count, sum))
    }

    /// Waits for one message.
    fn receive_one<const W: usize>(&mut self) -> Result<u64, Failure>
    where
        [u64; W]: Record<View = [u64; W]>,
    {
        loop {
            match self.receive::<W>()? {
                (0, _) => spin_hint(),
                (1, sum) => return Ok(sum / W as u64),
                (count, _) => {
                    return Err(Failure::Wrong(format!("{count} messages where one was sent")));
                }
            }
        }
    }
}

/// What the receiving process does: echo, receive and check, echo.
fn receiver<const W: usize>(mut ends: Ends, messages: u64) -> Result<(), Failure>
where
    [u64; W]: Record<View = [u64; W]> + FromBytes + IntoBytes,
{
    for _ in 0..WARM_UP {
        let number = ends.receive_one::<W>()?;
        ends.send::<W>(number, 1);
    }
    let (mut got, mut sum) = (0, 0u64);
    while got < messages {
        let (count, part) = ends.receive::<W>()?;
        // Who looks again at once takes lines that the sender is still writing: a step takes
        // longer.
        for _ in 0..if count == 0 { 1 } else { SPINS_OF_A_STEP } {
            spin_hint();
        }
        got += count;
        sum = sum.wrapping_add(part);
    }
    let numbers = u128::from(messages) * u128::from(messages - 1) / 2;
    if got != messages || sum != (numbers * W as u128) as u64 {
        return Err(Failure::Wrong(format!("{got} messages with sum {sum}, {messages} were sent")));
    }
    ends.send::<W>(7, 1);
    for _ in 0..ROUND_TRIPS {
        let number = ends.receive_one::<W>()?;
        ends.send::<W>(number, 1);
    }
    Ok(())
}

/// What the sending process does. Gives nanoseconds for all messages, and the round trips.
fn sender<const W: usize>(
    mut ends: Ends,
    messages: u64,
    batch: usize,
) -> Result<(u64, hdrhistogram::Histogram<u64>), Failure>
where
    [u64; W]: Record<View = [u64; W]> + FromBytes + IntoBytes,
{
    let clock = Clock::new();
    let round_trip = |ends: &mut Ends, number: u64| -> Result<u64, Failure> {
        let begun = ticks();
        ends.send::<W>(number, 1);
        let answer = ends.receive_one::<W>()?;
        let taken = clock.ns(begun, ticks());
        if answer != number {
            return Err(Failure::Wrong(format!("sent {number}, {answer} came back")));
        }
        Ok(taken)
    };
    for number in 0..WARM_UP {
        round_trip(&mut ends, number)?;
    }
    let begun = now_ns();
    let mut sent = 0;
    // The loops differ so that the compiler knows how many messages a frame has.
    if batch == 1 {
        while sent < messages {
            ends.send::<W>(sent, 1);
            sent += 1;
        }
    } else {
        while sent < messages {
            ends.send::<W>(sent, 64);
            sent += 64;
        }
    }
    ends.receive_one::<W>()?;
    let taken = now_ns() - begun;
    let mut times = histogram();
    for number in 0..ROUND_TRIPS {
        times.saturating_record(round_trip(&mut ends, number)?);
    }
    Ok((taken, times))
}

/// Starts the receiving process on `core`: a copy of this one that never returns.
fn fork_receiver<const W: usize>(scene: &Scene, core: usize, messages: u64) -> Result<i32, Failure>
where
    [u64; W]: Record<View = [u64; W]> + FromBytes + IntoBytes,
{
    // SAFETY: no other thread of this process runs (the regime's threads were joined), so the copy
    // may allocate.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    if pid == 0 {
        // SAFETY: plain system call: the copy goes when its parent does.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        regime::pin(core);
        let done = scene.attach(1).and_then(|ends| receiver::<W>(ends, messages));
        let code = match done {
            Ok(()) => 0,
            Err(failure) => {
                eprintln!("testudo-perf: receiving process: {failure}");
                i32::from(failure.code())
            }
        };
        // SAFETY: ends the copy without running what belongs to the parent.
        unsafe { libc::_exit(code) };
    }
    Ok(pid)
}

/// Measures one size and batch.
fn measure<const W: usize>(batch: usize, capacity: usize) -> Result<Vec<Line>, Failure>
where
    [u64; W]: Record<View = [u64; W]> + FromBytes + IntoBytes,
{
    let Some((own_core, other_core)) = two_cores() else {
        return Err(Failure::Run("the ring needs two cores; this process may use one".into()));
    };
    let messages = match W {
        1 => 20_000_000,
        8 => 10_000_000,
        _ => 2_000_000,
    };
    let messages = messages / 64 * 64;
    let (regime, result) = regime::around(|| {
        let scene = Arc::new(Scene::new(capacity)?);
        let pid = fork_receiver::<W>(&scene, other_core, messages)?;
        // A thread of its own: its pinning ends with it, and a receiver that failed leaves it
        // behind.
        let sending = std::thread::spawn(move || {
            regime::pin(own_core);
            let sent = scene.attach(0).and_then(|ends| sender::<W>(ends, messages, batch));
            if sent.is_err() {
                // SAFETY: the process is ours and not waited for yet.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            sent
        });
        let mut status = 0;
        // SAFETY: status is a valid place for the result.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if status != 0 && !sending.is_finished() {
            return Err(Failure::Wrong(format!(
                "the receiving process ended with status {status:#x}"
            )));
        }
        sending.join().unwrap_or_else(|_| Err(Failure::Run("the sending thread panicked".into())))
    });
    let (taken, times) = result?;
    let mut params = Params::new();
    params.insert("bytes".into(), (W * 8).into());
    params.insert("batch".into(), batch.into());
    params.insert("ring_bytes".into(), capacity.into());
    let mut lines = Lines::new("ring", params, regime);
    lines.add("msgs_per_s", (messages as f64 * 1e9 / taken as f64).round(), "1/s");
    if batch == 1 {
        for (metric, q) in [("rtt_ns_p50", 0.5), ("rtt_ns_p99", 0.99), ("rtt_ns_p999", 0.999)] {
            lines.add(metric, times.value_at_quantile(q), "ns");
        }
    }
    Ok(lines.finish())
}

/// Measures all that was asked for.
pub fn run(args: &Args) -> Result<Vec<Line>, Failure> {
    let mut lines = Vec::new();
    for bytes in args.bytes.map_or(vec![8, 64, 1024], |bytes| vec![bytes]) {
        for batch in args.batch.map_or(vec![1, 64], |batch| vec![batch]) {
            if batch != 1 && batch != 64 {
                return Err(Failure::Usage(format!("--batch {batch}: 1 or 64")));
            }
            let capacity = args.ring_bytes.map_or(default_capacity(bytes), |bytes| bytes.0);
            if !capacity.is_power_of_two() || capacity < PAGE.max(bytes * batch * 2) {
                return Err(Failure::Usage(format!(
                    "--ring-bytes {capacity}: a power of two, at least a page and two batches"
                )));
            }
            lines.extend(match bytes {
                8 => measure::<1>(batch, capacity)?,
                64 => measure::<8>(batch, capacity)?,
                1024 => measure::<128>(batch, capacity)?,
                _ => return Err(Failure::Usage(format!("--bytes {bytes}: 8, 64 or 1024"))),
            });
        }
    }
    Ok(lines)
}

/// As much as a core's own cache holds; for large messages, as much as a job's ring.
fn default_capacity(bytes: usize) -> usize {
    if bytes > 64 { 4 << 20 } else { 1 << 20 }
}
