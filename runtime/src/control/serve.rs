//! The thread behind a control socket: accepts, reads lines, hands requests on, writes answers.
//!
//! Invariants: nothing a client does makes it wait, grow without bound or end: lines, clients and
//! times are limited; of each client at most one request is with the job; an answer that comes
//! after its time is nobody's.
//!
//! Called by `socket`.

use super::protocol::{REQUEST_MAX, Reply, Request, line};
use super::socket::Lines;
use super::system::{self, Polled};
use crossbeam::channel::{Receiver, TryRecvError, TrySendError};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// Clients at a time.
const CLIENTS_MAX: usize = 32;

/// A client that says nothing, or does not take its answer, is let go after this.
const IDLE: Duration = Duration::from_secs(60);

/// Pause before the next try when no connection can be accepted: out of descriptors, say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What the job says to a client's request.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) client: u64,
    pub(super) serial: u64,
    pub(super) reply: Reply,
}

/// What a client is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// It may ask.
    Asks,
    /// The job has its request of this number.
    Waits(u64),
    /// It gets what is left to be written, and no more.
    Leaves,
}

#[derive(Debug)]
struct Client {
    id: u64,
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    turn: Turn,
    /// It has said all that it will say.
    has_ended: bool,
    is_gone: bool,
    until: Instant,
}

/// The thread's state.
pub(super) struct Server {
    listener: UnixListener,
    lines: Lines,
    answers: Receiver<Answer>,
    stopped: Receiver<()>,
    wake: Box<dyn Fn() + Send>,
    clients: Vec<Client>,
    /// Numbers clients and requests.
    serial: u64,
    accepts_from: Instant,
}

impl Server {
    pub(super) fn new(
        listener: UnixListener,
        lines: Lines,
        answers: Receiver<Answer>,
        stopped: Receiver<()>,
        wake: Box<dyn Fn() + Send>,
    ) -> Self {
        let accepts_from = Instant::now();
        let clients = Vec::new();
        Self { listener, lines, answers, stopped, wake, clients, serial: 0, accepts_from }
    }

    /// Serves until the socket's value is dropped.
    pub(super) fn run(mut self) {
        loop {
            let mut polled = self.polled();
            system::poll(&mut polled, self.patience());
            system::take_event(self.lines.bell.as_raw_fd());
            let is_over = self.stopped.try_recv() == Err(TryRecvError::Disconnected);
            self.take_answers();
            for (client, polled) in self.clients.iter_mut().zip(&polled[2..]) {
                if system::has_hung_up(polled) && polled.revents & libc::POLLIN == 0 {
                    client.is_gone = true;
                } else if polled.revents & libc::POLLIN != 0 {
                    client.read();
                }
            }
            for at in 0..self.clients.len() {
                self.serve(at);
            }
            self.clients.retain(|client| !client.is_gone);
            if is_over {
                return;
            }
            if polled[0].revents != 0 {
                self.accept();
            }
        }
    }

    fn polled(&self) -> Vec<Polled> {
        let may_accept = Instant::now() >= self.accepts_from;
        let mut polled = vec![
            system::polled(self.listener.as_raw_fd(), may_accept, false),
            system::polled(self.lines.bell.as_raw_fd(), true, false),
        ];
        polled.extend(self.clients.iter().map(|client| {
            let writes = !client.output.is_empty();
            let reads = client.turn == Turn::Asks && !client.has_ended && !writes;
            system::polled(client.stream.as_raw_fd(), reads, writes)
        }));
        polled
    }

    /// How long there is nothing to do if nothing comes.
    fn patience(&self) -> Duration {
        let now = Instant::now();
        let pause = (self.accepts_from > now).then_some(self.accepts_from);
        let next = self.clients.iter().map(|client| client.until).chain(pause).min();
        next.map_or(Duration::from_secs(3600), |until| until.saturating_duration_since(now))
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => {
                    self.accepts_from = Instant::now() + ACCEPT_PAUSE;
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            self.serial += 1;
            let mut client = Client::new(self.serial, stream);
            if let Some(refusal) = self.refusal(&client.stream) {
                client.leave(&refusal);
            }
            if self.clients.len() < 2 * CLIENTS_MAX {
                self.clients.push(client);
            }
        }
    }

    /// Why a client is not served.
    fn refusal(&self, stream: &UnixStream) -> Option<String> {
        match system::peer_user(stream) {
            Ok(peer) if peer == system::user() || peer == 0 => {}
            Ok(peer) => return Some(format!("user {peer} may not ask this job")),
            Err(error) => return Some(format!("who asks cannot be found out: {error}")),
        }
        let served = self.clients.iter().filter(|client| client.turn != Turn::Leaves).count();
        let too_many = format!("{served} others are being served; ask again later");
        (served >= CLIENTS_MAX).then_some(too_many)
    }

    fn take_answers(&mut self) {
        while let Ok(answer) = self.answers.try_recv() {
            let waits = |client: &&mut Client| {
                client.id == answer.client && client.turn == Turn::Waits(answer.serial)
            };
            if let Some(client) = self.clients.iter_mut().find(waits) {
                client.answer(&answer.reply);
            }
        }
    }

    /// Does what can be done for a client: its next request, its answers, its end.
    fn serve(&mut self, at: usize) {
        loop {
            let client = &mut self.clients[at];
            client.check_time();
            client.write();
            if client.is_gone || client.turn != Turn::Asks || !client.output.is_empty() {
                return;
            }
            match client.next_line() {
                Some(text) => self.ask(at, &text),
                None if client.has_ended => {
                    client.is_gone = true;
                    return;
                }
                None => return,
            }
        }
    }

    /// Hands a request to the job.
    fn ask(&mut self, at: usize, text: &[u8]) {
        let client = &mut self.clients[at];
        let request: Request = match serde_json::from_slice(text) {
            Ok(request) => request,
            Err(error) => {
                client.answer(&Reply::error(format!("this is no request: {error}")));
                return;
            }
        };
        self.serial += 1;
        client.turn = Turn::Waits(self.serial);
        client.until = Instant::now() + request.patience();
        let reply_to = self.lines.reply_to(client.id, self.serial);
        match self.lines.requests.try_send((request, reply_to)) {
            Ok(()) => (self.wake)(),
            Err(TrySendError::Full((_, reply_to))) => {
                reply_to.send(Reply::error("the job has many requests to answer; ask again"));
            }
            Err(TrySendError::Disconnected((_, reply_to))) => {
                reply_to.send(Reply::error("the job is ending"));
            }
        }
    }
}

impl Client {
    fn new(id: u64, stream: UnixStream) -> Self {
        Self {
            id,
            stream,
            input: Vec::new(),
            output: Vec::new(),
            turn: Turn::Asks,
            has_ended: false,
            is_gone: false,
            until: Instant::now() + IDLE,
        }
    }

    /// Reads what is there, up to one request's length.
    fn read(&mut self) {
        let mut buffer = [0; 4096];
        while self.input.len() <= REQUEST_MAX {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.has_ended = true;
                    return;
                }
                Ok(count) => {
                    self.input.extend_from_slice(&buffer[..count]);
                    self.until = Instant::now() + IDLE;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.is_gone = true;
                    return;
                }
            }
        }
    }

    /// The next whole line; the last one needs no end.
    fn next_line(&mut self) -> Option<Vec<u8>> {
        let end = self.input.iter().position(|byte| *byte == b'\n');
        let length = match end {
            Some(end) if end < REQUEST_MAX => end + 1,
            None if self.input.len() <= REQUEST_MAX => {
                if !self.has_ended || self.input.is_empty() {
                    return None;
                }
                self.input.len()
            }
            _ => {
                self.leave(&format!("a request has {REQUEST_MAX} bytes at most"));
                self.write();
                return None;
            }
        };
        Some(self.input.drain(..length).collect())
    }

    fn answer(&mut self, reply: &Reply) {
        self.output.extend(line(reply));
        self.turn = Turn::Asks;
        self.until = Instant::now() + IDLE;
    }

    /// The last that this client is told.
    fn leave(&mut self, why: &str) {
        self.answer(&Reply::error(why));
        self.input.clear();
        self.turn = Turn::Leaves;
    }

    fn check_time(&mut self) {
        if Instant::now() < self.until {
            return;
        }
        if let Turn::Waits(_) = self.turn {
            self.answer(&Reply::error("the job did not answer in time; it may be stopped or busy"));
        } else {
            self.is_gone = true;
        }
    }

    fn write(&mut self) {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) if count > 0 => drop(self.output.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => {
                    self.is_gone = true;
                    return;
                }
            }
        }
        self.is_gone |= self.turn == Turn::Leaves;
    }
}
