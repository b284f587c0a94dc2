//! The console: moves lines from standard input into rings and from rings to standard output.
//!
//! This is the small process without user code of R13: what was read from standard input lies in a
//! ring of the control segment, so no crash of a worker loses it. (Only the death of the supervisor
//! itself would.) A blocking read cannot be interrupted, so a thread of its own reads and hands
//! lines over through an in-process ring.
//!
//! Called by `launch`; runs as one thread while the job does, and only if the job has such edges.

use super::launch::Scene;
use super::watch::Events;
use crate::config::Settings;
use crate::error::Error;
use crate::plan::{EdgeKind, Plan};
use crate::time::now_ns;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::Duration;
use testudo_shm::consumer::{Consumer, Frame};
use testudo_shm::frame::Mark;
use testudo_shm::header::ControlHeader;
use testudo_shm::primitive::{AtomicU32, Ordering};
use testudo_shm::producer::Producer;
use testudo_shm::record::{Batch, Record};
use testudo_shm::wait::{self, WaitWord};

/// Lines that the reading thread may be ahead.
const AHEAD: usize = 1024;

/// Shared with the supervisor's loop.
#[derive(Debug, Default)]
struct Status {
    drain: AtomicU32,
    kill: AtomicU32,
    drained: AtomicU32,
    failed: AtomicU32,
    /// Bumped by the reading thread.
    lines: AtomicU32,
}

/// The console's thread, if the job needs one.
pub(crate) struct Console {
    status: Arc<Status>,
    thread: Option<std::thread::JoinHandle<Result<(), Error>>>,
}

struct Pump {
    status: Arc<Status>,
    outputs: Vec<(Consumer, bool)>,
    inputs: Vec<Producer>,
    lines: Option<rtrb::Consumer<Line>>,
    pending: Option<String>,
    input_is_over: bool,
    ended: usize,
    limit: u64,
    rate: Option<u64>,
    next_ns: u64,
    bells: Vec<(&'static AtomicU32, &'static AtomicU32)>,
    own: &'static ControlHeader,
    /// Eventfds of the workers, and one's own last, where words cannot be waited on.
    events: Option<Vec<i32>>,
}

/// What the reading thread found.
enum Line {
    Text(String),
    End,
    Failed(String),
}

impl Console {
    pub(crate) fn start(
        plan: &Plan,
        settings: &Settings,
        scene: &Scene,
        events: &Arc<Events>,
    ) -> Result<Self, Error> {
        let status = Arc::<Status>::default();
        let supervisor = plan.supervisor();
        let has = |kind| plan.edges.iter().any(|edge| edge.kind == kind);
        if !has(EdgeKind::Stdin) && !has(EdgeKind::Stdout) {
            status.drained.store(1, Ordering::Release);
            return Ok(Self { status, thread: None });
        }
        let mut pump = Pump::new(plan, settings, scene, &status, supervisor);
        if has(EdgeKind::Stdin) {
            pump.lines = Some(read_lines(&status)?);
        }
        let bell = Arc::clone(events);
        let run = move || {
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
fn read_lines(status: &Arc<Status>) -> Result<rtrb::Consumer<Line>, Error> {
    let (mut send, receive) = rtrb::RingBuffer::new(AHEAD);
    let status = Arc::clone(status);
    let run = move || {
        let mut input = std::io::stdin().lock();
        loop {
            let mut bytes = Vec::new();
            let line = match input.read_until(b'\n', &mut bytes) {
                Ok(0) => Line::End,
                Ok(_) => {
                    let end = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
                    let end = end.strip_suffix(b"\r").unwrap_or(end);
                    Line::Text(String::from_utf8_lossy(end).into_owned())
                }
                Err(error) => Line::Failed(error.to_string()),
            };
            let is_last = !matches!(line, Line::Text(_));
            let mut line = Some(line);
            while let Some(unsent) = line.take() {
                if let Err(rtrb::PushError::Full(back)) = send.push(unsent) {
                    if send.is_abandoned() {
                        return;
                    }
                    line = Some(back);
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            status.lines.fetch_add(1, Ordering::Release);
            wait::wake_all(&status.lines);
            if is_last {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("testudo-stdin".into()).spawn(run);
    thread.map_err(|error| Error::Machine(format!("cannot start a thread: {error}")))?;
    Ok(receive)
}

impl Pump {
    fn new(
        plan: &Plan,
        settings: &Settings,
        scene: &Scene,
        status: &Arc<Status>,
        supervisor: usize,
    ) -> Self {
        let (inputs, outputs) = super::launch::console_ends(plan, scene, supervisor);
        Self {
            status: Arc::clone(status),
            outputs: outputs.into_iter().map(|end| (end, false)).collect(),
            inputs,
            lines: None,
            pending: None,
            input_is_over: false,
            ended: 0,
            limit: settings.limit.unwrap_or(u64::MAX),
            rate: settings.rate,
            next_ns: 0,
            bells: scene.workers.iter().map(|header| (&header.bell, &header.sleeping)).collect(),
            own: scene.control_header,
            events: scene.description.events.clone(),
        }
    }

    fn run(&mut self) -> Result<(), Error> {
        let mut out = std::io::BufWriter::with_capacity(64 << 10, std::io::stdout().lock());
        loop {
            if self.status.kill.load(Ordering::Acquire) != 0 {
                return Ok(());
            }
            let seen = self.status.lines.load(Ordering::Acquire);
            let values: Vec<u32> =
                self.bells.iter().map(|(bell, _)| bell.load(Ordering::Acquire)).collect();
            wait::announce(&self.own.sleeping);
            let moved = self.move_input()? | self.move_output(&mut out)?;
            if moved {
                wait::awake(&self.own.sleeping);
                self.wake_workers();
                continue;
            }
            out.flush().map_err(|error| broken(&error))?;
            if self.ended == self.inputs.len() && self.outputs.iter().all(|(_, ended)| *ended) {
                return Ok(());
            }
            self.sleep(seen, &values);
            wait::awake(&self.own.sleeping);
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
        for ((bell, _), value) in self.bells.iter().zip(values) {
            words.push(WaitWord { word: bell, value: *value });
        }
        wait::wait_any(&words, timeout);
    }

    fn wake_workers(&self) {
        wait::publish_fence();
        if self.bells.iter().any(|(_, sleeping)| wait::must_wake(sleeping)) {
            match &self.events {
                None => wait::ring_bell(&self.own.bell),
                Some(events) => events.iter().for_each(|event| wait::wake_event(*event)),
            }
        }
    }

    /// Moves lines into the first ring; true when anything moved.
    fn move_input(&mut self) -> Result<bool, Error> {
        let Some(lines) = &mut self.lines else {
            return Ok(false);
        };
        let mut moved = false;
        if self.status.drain.load(Ordering::Acquire) != 0 || self.limit == 0 {
            self.input_is_over = true;
        }
        while !self.input_is_over {
            if self.rate.is_some() && self.next_ns > now_ns() {
                break;
            }
            let line = match self.pending.take() {
                Some(line) => line,
                None => match lines.pop() {
                    Ok(Line::Text(line)) => line,
                    Ok(Line::End) => {
                        self.input_is_over = true;
                        break;
                    }
                    Ok(Line::Failed(error)) => {
                        return Err(Error::job("standard input", error));
                    }
                    Err(_) => break,
                },
            };
            if !send_line(&mut self.inputs[0], &line)? {
                self.pending = Some(line);
                break;
            }
            moved = true;
            self.limit -= 1;
            if let Some(rate) = self.rate {
                self.next_ns =
                    self.next_ns.max(now_ns().saturating_sub(10_000_000)) + 1_000_000_000 / rate;
            }
            self.input_is_over = self.limit == 0;
        }
        if self.input_is_over && self.ended < self.inputs.len() {
            moved |= self.end_input();
        }
        for input in &mut self.inputs {
            input.publish();
        }
        Ok(moved)
    }

    fn end_input(&mut self) -> bool {
        let mark = Mark { watermark: i64::MAX, sent_ns: 0, routing: 0 };
        while self.ended < self.inputs.len() {
            let input = &mut self.inputs[self.ended];
            if input.room(64) < 64 || !input.mark(mark) || !input.end() {
                return false;
            }
            self.ended += 1;
        }
        true
    }

    /// Writes what workers printed; true when anything moved.
    fn move_output(&mut self, out: &mut impl Write) -> Result<bool, Error> {
        let mut moved = false;
        for (ring, ended) in &mut self.outputs {
            ring.look();
            while let Some(frame) = ring.frame() {
                match frame {
                    Frame::Data { bytes, count } => {
                        let lines = Batch::<String>::check(bytes, count, 0)
                            .map_err(|fault| Error::job("standard output", fault.to_string()))?;
                        for line in lines {
                            let text = line.view.as_bytes();
                            out.write_all(text)
                                .and_then(|()| out.write_all(b"\n"))
                                .map_err(|e| broken(&e))?;
                        }
                    }
                    Frame::Mark(_) => {}
                    Frame::End => *ended = true,
                }
                ring.take();
                moved = true;
            }
            if let Some(fault) = ring.fault() {
                return Err(Error::job("standard output", format!("its ring is damaged: {fault}")));
            }
            if moved {
                // What is given back must be out of this process first, or a killed supervisor
                // loses it unseen.
                out.flush().map_err(|error| broken(&error))?;
                ring.publish();
            }
        }
        Ok(moved)
    }
}

fn send_line(ring: &mut Producer, line: &str) -> Result<bool, Error> {
    let line = line.to_owned();
    let mut scratch = testudo_shm::record::Scratch::default();
    let item = line.item(&mut scratch);
    let bytes = String::item_len(item);
    if bytes as u64 + 256 > ring.capacity() {
        return Err(Error::job(
            "standard input",
            format!(
                "a line of {bytes} bytes does not fit into a ring of {}; raise --ring-bytes",
                ring.capacity()
            ),
        ));
    }
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
