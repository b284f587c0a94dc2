//! The console: moves lines from standard input into rings and from rings to standard output.
//!
//! This is the small process without user code of R13: no crash of a worker loses a line, since
//! rings lie in segments; and none of the supervisor, since everything between a stream and a ring
//! lies in pipes that the keeper has as well (`gate`). A blocking read cannot be interrupted, so a
//! thread of its own moves input into the outermost pipe.
//!
//! What happens when standard output fails, or takes nothing, is `printing`'s.
//!
//! Called by `launch`; runs as one thread while the job does, and only if the job has such edges.

mod gate;

mod settle;

pub(super) use gate::Gate;
pub(crate) use gate::{Ends, Words};

use gate::{OUT_BYTES, splice, wait_for_input};

use super::board::Externals;
use super::launch::Scene;
use super::printing::Printing;
use super::watch::Events;
use crate::config::Settings;
use crate::error::Error;
use crate::keeper::Line;
use crate::plan::layout::RingPlan;
use crate::plan::{EdgeKind, Plan};
use crate::testing::{Point, arm_supervisor, point};
use crate::time::now_ns;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use testudo_shm::consumer::{Consumer, Frame};
use testudo_shm::frame::Mark;
use testudo_shm::header::{ControlHeader, WorkerHeader, WorkerState, control};
use testudo_shm::primitive::{AtomicU32, Ordering};
use testudo_shm::producer::Producer;
use testudo_shm::record::{Batch, Record};
use testudo_shm::wait::{self, WaitWord};

/// Shared with the supervisor's loop.
#[derive(Debug, Default)]
struct Status {
    drain: AtomicU32,
    kill: AtomicU32,
    drained: AtomicU32,
    failed: AtomicU32,
    /// Bumped by the reading thread.
    lines: AtomicU32,
    /// Standard input has ended.
    has_ended: AtomicU32,
    /// Why it cannot be read.
    error: std::sync::OnceLock<String>,
    /// Not zero: the console is to stand still.
    hold: AtomicU32,
    /// It does: all that was in its rings is printed.
    held: AtomicU32,
    /// Ends of rings that begin anew, by their place among the outputs.
    renewed: Mutex<Vec<(usize, Consumer)>>,
}

/// The console's thread, if the job needs one.
pub(crate) struct Console {
    status: Arc<Status>,
    thread: Option<std::thread::JoinHandle<Result<(), Error>>>,
}

struct Pump {
    status: Arc<Status>,
    /// Each with the worker that prints there, and whether that has printed its last.
    outputs: Vec<(Consumer, usize, bool)>,
    inputs: Vec<Producer>,
    gate: Gate,
    words: &'static Words,
    /// What is in the gate's inner pipe, as far as it was looked at.
    bytes: Vec<u8>,
    /// The beginning of a line that is larger than the pipe.
    long: Vec<u8>,
    has_input: bool,
    input_is_over: bool,
    limit: u64,
    rate: Option<u64>,
    next_ns: u64,
    workers: Vec<&'static WorkerHeader>,
    own: &'static ControlHeader,
    /// Taken out while it runs.
    printing: Option<Printing>,
    /// Told when the job's only output is gone.
    is_only_output: bool,
    wakes: Option<Arc<Events>>,
    /// Eventfds of the workers, and one's own last, where words cannot be waited on.
    events: Option<Vec<i32>>,
}

/// What a console is made of that outlives a supervisor.
#[derive(Debug)]
pub(crate) struct Kept {
    gate: Gate,
    words: &'static Words,
}

impl Kept {
    /// For a job that begins; `None` where it reads and prints nothing.
    pub(crate) fn new(
        plan: &Plan,
        line: Option<&Line>,
        words: &'static Words,
    ) -> Result<Option<Self>, Error> {
        let is_needed =
            plan.edges.iter().any(|e| matches!(e.kind, EdgeKind::Stdin | EdgeKind::Stdout));
        is_needed.then(|| Ok(Self { gate: Gate::new(line)?, words })).transpose()
    }

    /// For a job that runs.
    pub(crate) fn adopt(ends: &Ends, words: &'static Words) -> Result<Self, Error> {
        Ok(Self { gate: Gate::adopt(ends)?, words })
    }

    /// Its descriptors, for the keeper.
    pub(crate) fn ends(&self) -> Ends {
        self.gate.ends()
    }
}

/// Time for what workers printed to be written, when the job goes back.
const SETTLING: Duration = Duration::from_secs(5);

impl Console {
    pub(crate) fn start(
        plan: &Plan,
        settings: &Settings,
        scene: &Scene,
        events: &Arc<Events>,
        kept: Option<Kept>,
        externals: &Externals,
    ) -> Result<Self, Error> {
        let Some(kept) = kept else { return Ok(Self::none()) };
        let status = Arc::<Status>::default();
        let mut pump = Pump::new(plan, settings, scene, &status, kept);
        pump.printing = Some(Printing::new(externals.clone()));
        pump.wakes = Some(Arc::clone(events));
        if pump.has_input && !pump.input_is_over {
            let failed = |error| Error::Machine(format!("standard input: {error}"));
            move_in(&status, pump.gate.entrance().map_err(failed)?)?;
        }
        let bell = Arc::clone(events);
        let run = move || {
            arm_supervisor();
            let result = pump.run();
            if result.is_err() {
                pump.status.failed.store(1, Ordering::Release);
            }
            pump.status.drained.store(1, Ordering::Release);
            bell.bump();
            result
        };
        let thread = std::thread::Builder::new().name("testudo-console".into()).spawn(run);
        let thread =
            thread.map_err(|error| Error::Machine(format!("cannot start a thread: {error}")))?;
        Ok(Self { status, thread: Some(thread) })
    }

    /// No console: the job has none, or is over.
    pub(crate) fn none() -> Self {
        let status = Arc::<Status>::default();
        status.drained.store(1, Ordering::Release);
        Self { status, thread: None }
    }

    /// Takes no more input.
    pub(crate) fn drain(&self) {
        self.status.drain.store(1, Ordering::Release);
        self.status.lines.fetch_add(1, Ordering::Release);
        wait::wake_all(&self.status.lines);
    }

    /// True when all input is in rings and all output is written.
    pub(crate) fn is_drained(&self) -> bool {
        self.status.drained.load(Ordering::Acquire) != 0
    }

    /// Has the console print what is in its rings, and then stand still; true once it does. To be
    /// asked again until then.
    pub(crate) fn hold(&self) -> bool {
        if self.thread.is_none() {
            return true;
        }
        if self.status.hold.swap(1, Ordering::AcqRel) == 0 {
            self.status.lines.fetch_add(1, Ordering::Release);
            wait::wake_all(&self.status.lines);
        }
        self.status.held.load(Ordering::Acquire) != 0 || self.is_drained()
    }

    /// Lets the console go on, with new ends of some rings, by their place among its outputs.
    pub(crate) fn let_go(&self, renewed: Vec<(usize, Consumer)>) {
        let mut place = self.status.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        place.extend(renewed);
        drop(place);
        self.status.held.store(0, Ordering::Release);
        self.status.hold.store(0, Ordering::Release);
    }

    /// Waits for what is in its rings to be printed, not for ever: nobody writes there any more.
    pub(crate) fn settle(&self) {
        let until = std::time::Instant::now() + SETTLING;
        while !self.hold() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Fails once the console has failed; `join` says why.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.status.failed.load(Ordering::Acquire) != 0 {
            return Err(Error::job("standard input or output", "the console stopped"));
        }
        Ok(())
    }

    /// Whether the console itself gave up, so that its error is the one that says what happened.
    pub(crate) fn has_failed(&self) -> bool {
        self.status.failed.load(Ordering::Acquire) != 0
    }

    /// Waits for the thread; not for long when the job failed.
    pub(crate) fn join(self, at_once: bool) -> Result<(), Error> {
        if at_once {
            self.status.kill.store(1, Ordering::Release);
            self.status.lines.fetch_add(1, Ordering::Release);
            wait::wake_all(&self.status.lines);
        }
        // A write to a reader that does not read cannot be interrupted; the process ends without
        // it.
        let patience = std::time::Instant::now();
        while at_once && self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            if patience.elapsed() > Duration::from_millis(200) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        match self.thread.map(std::thread::JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::Machine("the console's thread panicked".into())),
        }
    }
}

/// Starts the thread that blocks on standard input. It is never joined: nothing can interrupt its
/// read.
fn move_in(status: &Arc<Status>, mut entrance: File) -> Result<(), Error> {
    let status = Arc::clone(status);
    let run = move || {
        loop {
            let moved = match splice(0, entrance.as_raw_fd(), CHUNK, true) {
                Ok(Some(moved)) => Ok(moved),
                Ok(None) => copy_in(&mut entrance),
                Err(error) => Err(error),
            };
            if moved.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
                wait_for_input();
                continue;
            }
            let is_last = !matches!(moved, Ok(1..));
            if let Err(error) = moved {
                // The first error stays.
                let _ = status.error.set(error.to_string());
            }
            status.has_ended.fetch_or(u32::from(is_last), Ordering::Release);
            status.lines.fetch_add(1, Ordering::Release);
            wait::wake_all(&status.lines);
            if is_last {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("testudo-stdin".into()).spawn(run);
    thread.map_err(|error| Error::Machine(format!("cannot start a thread: {error}")))?;
    Ok(())
}

/// Bytes that are moved in at once.
const CHUNK: usize = 64 << 10;

/// Reads and writes what cannot be moved.
fn copy_in(entrance: &mut File) -> std::io::Result<usize> {
    let mut bytes = vec![0; CHUNK];
    let got = std::io::stdin().lock().read(&mut bytes)?;
    entrance.write_all(&bytes[..got])?;
    Ok(got)
}

impl Pump {
    fn new(
        plan: &Plan,
        settings: &Settings,
        scene: &Scene,
        status: &Arc<Status>,
        kept: Kept,
    ) -> Self {
        let Kept { mut gate, words } = kept;
        let supervisor = plan.supervisor();
        let rings = |is_own: &dyn Fn(&RingPlan) -> bool| {
            let own = plan.layout.rings.iter().filter(|ring| is_own(ring));
            own.map(|ring| (scene.ring_parts(plan, ring), ring.from)).collect::<Vec<_>>()
        };
        let inputs = rings(&|ring| ring.from == supervisor);
        let outputs = rings(&|ring| ring.to == supervisor);
        settle::input(&mut gate, words, &inputs);
        settle::output(&mut gate, words, &outputs);
        let (inputs, outputs) = super::launch::console_ends(&inputs, &outputs);
        Self {
            status: Arc::clone(status),
            outputs: outputs.into_iter().map(|(end, worker)| (end, worker, false)).collect(),
            has_input: !inputs.is_empty(),
            inputs,
            gate,
            words,
            bytes: Vec::new(),
            long: Vec::new(),
            input_is_over: Words::get(&words.is_over) != 0,
            limit: settings.limit.unwrap_or(u64::MAX),
            rate: settings.rate,
            next_ns: 0,
            workers: scene.workers.clone(),
            own: scene.control_header,
            printing: None,
            is_only_output: is_only_output(plan),
            wakes: None,
            events: scene.description.events.clone(),
        }
    }

    fn run(&mut self) -> Result<(), Error> {
        let Some(mut out) = self.printing.take() else { return Ok(()) };
        let result = self.pump(&mut out);
        if out.lost() > 0 {
            crate::say!("testudo: {} lines for standard output had no reader", out.lost());
        }
        result
    }

    fn pump(&mut self, out: &mut Printing) -> Result<(), Error> {
        loop {
            if self.status.kill.load(Ordering::Acquire) != 0 {
                return Ok(());
            }
            if self.status.hold.load(Ordering::Acquire) != 0 {
                self.stand_still(out)?;
                continue;
            }
            let seen = self.status.lines.load(Ordering::Acquire);
            let bells = self.workers.iter().map(|worker| worker.bell.load(Ordering::Acquire));
            let values: Vec<u32> = bells.collect();
            wait::announce(&self.own.sleeping);
            let moved = self.move_input()? | self.move_output(out)?;
            if out.is_closed() {
                self.note_closed();
            }
            if moved {
                wait::awake(&self.own.sleeping);
                self.wake_workers();
                continue;
            }
            let is_out = out.flush(&mut self.gate)?;
            let has_ended = Words::get(&self.words.ended) as usize == self.inputs.len();
            if is_out && has_ended && self.outputs.iter().all(|(_, _, ended)| *ended) {
                return Ok(());
            }
            self.sleep(seen, &values);
            wait::awake(&self.own.sleeping);
        }
    }

    /// While a region goes back: nobody writes to its rings, and what is in them is printed first.
    fn stand_still(&mut self, out: &mut Printing) -> Result<(), Error> {
        // What there is no room for is waited for: no line may be lost.
        while !self.is_all_out(out)? {
            if self.status.kill.load(Ordering::Acquire) != 0 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        self.status.held.store(1, Ordering::Release);
        while self.status.hold.load(Ordering::Acquire) != 0 {
            if self.status.kill.load(Ordering::Acquire) != 0 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let mut renewed = self.status.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        for (place, mut end) in renewed.drain(..) {
            end.publish();
            (self.outputs[place].0, self.outputs[place].2) = (end, false);
        }
        Ok(())
    }

    /// Writes what is in rings; true once nothing is left there, or on the way.
    fn is_all_out(&mut self, out: &mut Printing) -> Result<bool, Error> {
        while self.move_output(out)? {}
        let is_taken = self.outputs.iter().all(|(ring, ..)| !ring.is_unpublished());
        Ok(out.flush(&mut self.gate)? && is_taken)
    }

    /// Nobody reads what the job prints: it ends if that is all that it does.
    #[cold]
    fn note_closed(&mut self) {
        let Some(events) = self.wakes.take() else { return };
        if self.is_only_output {
            crate::say!("testudo: standard output has no reader any more: the job ends");
            events.request_stop();
        } else {
            crate::say!("testudo: standard output has no reader any more; the job goes on");
        }
    }

    fn sleep(&self, seen: u32, values: &[u32]) {
        let timeout = Some(Duration::from_millis(if self.rate.is_some() { 1 } else { 50 }));
        if let Some(events) = &self.events {
            // The reading thread cannot reach an eventfd's word; a short sleep bounds its wait.
            if let Some(own) = events.last() {
                wait::wait_event(*own, Some(Duration::from_millis(1)));
            }
            return;
        }
        let mut words = vec![WaitWord { word: &self.status.lines, value: seen }];
        for (worker, value) in self.workers.iter().zip(values) {
            words.push(WaitWord { word: &worker.bell, value: *value });
        }
        wait::wait_any(&words, timeout);
    }

    fn wake_workers(&self) {
        wait::publish_fence();
        if self.workers.iter().any(|worker| wait::must_wake(&worker.sleeping)) {
            match &self.events {
                None => wait::ring_bell(&self.own.bell),
                Some(events) => events.iter().for_each(|event| wait::wake_event(*event)),
            }
        }
    }

    /// Moves lines into the first ring; true when anything moved.
    fn move_input(&mut self) -> Result<bool, Error> {
        if !self.has_input {
            return Ok(false);
        }
        let left = self.limit.saturating_sub(Words::get(&self.words.lines));
        if self.status.drain.load(Ordering::Acquire) != 0 || left == 0 {
            self.end_of_input();
        }
        let mut moved = false;
        let is_held = self.own.control.load(Ordering::Acquire) & control::HOLD != 0;
        if !self.input_is_over && !is_held {
            // Whether it has ended before what is there: nothing comes after that.
            let has_ended = self.status.has_ended.load(Ordering::Acquire) != 0;
            self.gate.look(&mut self.bytes).map_err(|error| unread(&error))?;
            let is_all = has_ended
                && self.gate.outer.filled() == 0
                && self.gate.inner.filled() == self.bytes.len();
            let (used, lines) = self.push_lines(is_all, left)?;
            moved = used > 0;
            if moved {
                self.cross(used, lines)?;
            } else if self.rate.is_none_or(|_| self.next_ns <= now_ns()) {
                moved = self.take_long()?;
            }
            if is_all && self.bytes.is_empty() && self.long.is_empty() {
                if let Some(error) = self.status.error.get() {
                    crate::say!("testudo: standard input: {error}; taken as its end");
                }
                self.end_of_input();
            }
        }
        if self.input_is_over {
            moved |= self.tell_the_end();
        }
        Ok(moved)
    }

    /// Puts whole lines into the ring, as far as there is room; how many bytes and lines they are.
    /// With `is_all`, what is left without a line's end is a line too.
    fn push_lines(&mut self, is_all: bool, most: u64) -> Result<(usize, u64), Error> {
        let (mut used, mut lines) = (0, 0);
        while lines < most && self.rate.is_none_or(|_| self.next_ns <= now_ns()) {
            let rest = &self.bytes[used..];
            let length = match memchr::memchr(b'\n', rest) {
                Some(end) => end + 1,
                None if is_all && rest.len() + self.long.len() > 0 => rest.len(),
                None => break,
            };
            let whole = if self.long.is_empty() {
                text(&rest[..length])
            } else {
                text(&[&self.long[..], &rest[..length]].concat())
            };
            if !send_line(&mut self.inputs[0], &whole)? {
                break;
            }
            self.long.clear();
            (used, lines) = (used + length, lines + 1);
            if let Some(rate) = self.rate {
                self.next_ns =
                    self.next_ns.max(now_ns().saturating_sub(10_000_000)) + 1_000_000_000 / rate;
            }
            if length == 0 {
                // The last part of a long line had come before.
                self.cross(0, lines)?;
                break;
            }
        }
        Ok((used, lines))
    }

    /// Hands lines over: the bytes leave the pipe when the ring has them.
    fn cross(&mut self, used: usize, lines: u64) -> Result<(), Error> {
        let words = self.words;
        let then = Words::get(&words.lines) + lines;
        Words::set(&words.filled, self.gate.inner.filled() as u64);
        Words::set(&words.tail, self.inputs[0].position());
        Words::set(&words.lines_then, then);
        Words::set(&words.taken, used as u64);
        point(Point::InputNoted);
        self.inputs[0].publish();
        point(Point::InputPublished);
        self.gate.inner.drop_front(used).map_err(|error| unread(&error))?;
        point(Point::InputTaken);
        Words::set(&words.lines, then);
        Words::set(&words.taken, 0);
        self.bytes.drain(..used);
        Ok(())
    }

    /// A line fills the whole pipe: its beginning comes here, so that there is room for its end.
    /// True when there was one.
    fn take_long(&mut self) -> Result<bool, Error> {
        if self.bytes.is_empty() || memchr::memchr(b'\n', &self.bytes).is_some() {
            return Ok(false);
        }
        let is_full = self.gate.is_full().map_err(|error| unread(&error))?;
        if !is_full || self.gate.inner.filled() != self.bytes.len() {
            return Ok(false);
        }
        self.gate.inner.drop_front(self.bytes.len()).map_err(|error| unread(&error))?;
        self.long.append(&mut self.bytes);
        check_length(&self.inputs[0], self.long.len())?;
        Ok(true)
    }

    /// No more input is taken, by this supervisor or a later one.
    fn end_of_input(&mut self) {
        self.input_is_over = true;
        Words::set(&self.words.is_over, 1);
    }

    /// Tells the rings that input has ended, each once; true when one was told.
    fn tell_the_end(&mut self) -> bool {
        let mark = Mark { watermark: i64::MAX, sent_ns: 0, routing: 0 };
        let words = self.words;
        let mut moved = false;
        while let Some(input) = self.inputs.get_mut(Words::get(&words.ended) as usize) {
            if input.room(64) < 64 || !input.mark(mark) || !input.end() {
                return moved;
            }
            Words::set(&words.end_tail, input.position());
            input.publish();
            Words::set(&words.ended, Words::get(&words.ended) + 1);
            Words::set(&words.end_tail, 0);
            moved = true;
        }
        moved
    }

    /// Writes what workers printed; true when anything moved. What is given back to a ring is in
    /// the gate's pipe, or out, before that.
    fn move_output(&mut self, out: &mut Printing) -> Result<bool, Error> {
        if !out.flush(&mut self.gate)? {
            return Ok(false);
        }
        let mut moved = false;
        let mut bytes = Vec::new();
        for number in 0..self.outputs.len() {
            let (ring, worker, ended) = &mut self.outputs[number];
            // Who has finished has published all before. (An earlier supervisor may have taken the
            // last frame.)
            let state = self.workers[*worker].state.load(Ordering::Acquire);
            ring.look();
            // What was larger than the pipe is out by now.
            if ring.is_unpublished() {
                ring.publish();
                moved = true;
            }
            bytes.clear();
            let mut frames = 0;
            while let Some(frame) = ring.frame() {
                match frame {
                    Frame::Data { bytes: data, count } => print_lines(data, count, &mut bytes)?,
                    Frame::Mark(_) => {}
                    Frame::End => *ended = true,
                }
                ring.take();
                frames += 1;
                if bytes.len() >= OUT_BYTES {
                    break;
                }
            }
            if let Some(fault) = ring.fault() {
                return Err(Error::job("standard output", format!("its ring is damaged: {fault}")));
            }
            *ended |= frames == 0 && state == WorkerState::Finished as u32;
            if frames > 0 {
                moved = true;
                self.print(number, &bytes, out).map_err(|error| broken(&error))?;
                if !out.flush(&mut self.gate)? {
                    break;
                }
            }
        }
        Ok(moved)
    }

    /// Prints what was taken from a ring: it leaves the ring when the pipe has it.
    fn print(&mut self, number: usize, bytes: &[u8], out: &mut Printing) -> std::io::Result<()> {
        let words = self.words;
        let ring = &mut self.outputs[number].0;
        if out.is_closed() {
            out.lose(bytes);
            ring.publish();
            return Ok(());
        }
        if bytes.len() > self.gate.out.capacity() {
            // Published when it is out.
            out.keep(bytes);
            return Ok(());
        }
        Words::set(&words.ring, number as u64);
        Words::set(&words.head, ring.position());
        Words::set(&words.put, bytes.len() as u64);
        point(Point::OutputNoted);
        self.gate.out.put(bytes)?;
        point(Point::OutputPut);
        ring.publish();
        point(Point::OutputPublished);
        Words::set(&words.put, 0);
        Ok(())
    }
}

/// The lines of a frame, each with its end.
fn print_lines(data: &[u8], count: usize, into: &mut Vec<u8>) -> Result<(), Error> {
    let lines = Batch::<String>::check(data, count, 0)
        .map_err(|fault| Error::job("standard output", fault.to_string()))?;
    for line in lines {
        into.extend_from_slice(line.view.as_bytes());
        into.push(b'\n');
    }
    Ok(())
}

/// A line without its end.
fn text(bytes: &[u8]) -> String {
    let end = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let end = end.strip_suffix(b"\r").unwrap_or(end);
    String::from_utf8_lossy(end).into_owned()
}

fn check_length(ring: &Producer, bytes: usize) -> Result<(), Error> {
    if bytes as u64 + 256 <= ring.capacity() {
        return Ok(());
    }
    Err(Error::job(
        "standard input",
        format!(
            "a line of {bytes} bytes does not fit into a ring of {}; raise --ring-bytes",
            ring.capacity()
        ),
    ))
}

/// Whether a job does nothing but print.
fn is_only_output(plan: &Plan) -> bool {
    let prints = plan.edges.iter().filter(|edge| edge.kind == EdgeKind::Stdout).count();
    let sinks = plan.operators.iter().filter(|o| o.kind == "sink" && o.name != "rejects").count();
    sinks <= prints
}

fn send_line(ring: &mut Producer, line: &str) -> Result<bool, Error> {
    let line = line.to_owned();
    let mut scratch = testudo_shm::record::Scratch::default();
    let item = line.item(&mut scratch);
    let bytes = String::item_len(item);
    check_length(ring, bytes)?;
    let Some(mut frame) = ring.reserve(bytes) else {
        return Ok(false);
    };
    match String::put_item(item, frame.space()) {
        Some(used) => frame.close(used, 1),
        None => return Ok(false),
    }
    Ok(true)
}

fn broken(error: &std::io::Error) -> Error {
    Error::job("standard output", format!("cannot write: {error}"))
}

fn unread(error: &std::io::Error) -> Error {
    Error::job("standard input", format!("cannot read: {error}"))
}
