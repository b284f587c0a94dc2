//! A small HTTP server for the numbers: `GET /metrics` and `GET /healthz`, one thread, one answer a
//! connection.
//!
//! Invariants: nothing that a client does makes it wait, grow without bound or end. Connections,
//! bytes of a request and the time for it are limited; when all places are taken, the oldest
//! connection makes room. It only reads: nothing can be changed through it.
//!
//! Called by `supervisor/board`.

use crate::control::system::{self, Polled};
use crate::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testudo_shm::primitive::{AtomicU32, Ordering};

/// Connections at a time.
const CLIENTS_MAX: usize = 16;

/// Bytes of a request's head; what follows it is not read.
const HEAD_MAX: usize = 8 << 10;

/// Time for a connection, from its first to its last byte.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pause before the next try when no connection can be accepted: out of descriptors, say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What is served.
pub(crate) trait Served: Send + 'static {
    /// The numbers as text.
    fn metrics(&self) -> String;

    /// Whether the job's supervisor is at work, and a few words about it.
    fn health(&self) -> (bool, String);
}

/// The server; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct MetricsServer {
    address: SocketAddr,
    stop: Arc<AtomicU32>,
    bell: Arc<OwnedFd>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl MetricsServer {
    /// Takes an address, at which nobody is answered yet; port 0 is any free one.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub(crate) fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
        let refuse = |error: std::io::Error| {
            let hint = match error.kind() {
                ErrorKind::AddrInUse => {
                    "another program has that port; choose another one, or 0 for any free one"
                }
                ErrorKind::PermissionDenied => "ports below 1024 are for the administrator",
                _ => "choose an address of this machine, such as 127.0.0.1:0",
            };
            Error::Usage(format!("--listen {address}: {error}: {hint}"))
        };
        let listener = TcpListener::bind(address).map_err(refuse)?;
        listener.set_nonblocking(true).map_err(refuse)?;
        Ok(listener)
    }

    /// Begins to serve.
    ///
    /// # Errors
    /// When there is no thread for it, or the listener is none.
    pub(crate) fn start(listener: TcpListener, served: impl Served) -> Result<Self, Error> {
        let refuse = |error| Error::Machine(format!("the listener of --listen: {error}"));
        let address = listener.local_addr().map_err(refuse)?;
        let bell = Arc::new(crate::supervisor::watch::event_fd()?);
        let stop = Arc::<AtomicU32>::default();
        let server = Server {
            listener,
            served: Box::new(served),
            stop: Arc::clone(&stop),
            bell: Arc::clone(&bell),
            clients: Vec::new(),
            accepts_from: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name("testudo-metrics".into())
            .spawn(move || server.run())
            .map_err(|error| Error::Machine(format!("cannot start a thread: {error}")))?;
        Ok(Self { address, stop, bell, thread: Some(thread) })
    }

    /// Where it serves.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.stop.store(1, Ordering::Release);
        testudo_shm::wait::wake_event(self.bell.as_raw_fd());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

struct Server {
    listener: TcpListener,
    served: Box<dyn Served>,
    stop: Arc<AtomicU32>,
    bell: Arc<OwnedFd>,
    clients: Vec<Client>,
    accepts_from: Instant,
}

struct Client {
    stream: TcpStream,
    head: Vec<u8>,
    /// The answer, and how much of it is written.
    answer: Option<(Vec<u8>, usize)>,
    until: Instant,
    is_gone: bool,
}

impl Server {
    fn run(mut self) {
        loop {
            let mut polled = self.polled();
            system::poll(&mut polled, self.patience());
            if self.stop.load(Ordering::Acquire) != 0 {
                return;
            }
            let now = Instant::now();
            for (client, polled) in self.clients.iter_mut().zip(&polled[2..]) {
                if polled.revents != 0 {
                    client.go_on(&*self.served);
                }
                client.is_gone |= now >= client.until;
            }
            self.clients.retain(|client| !client.is_gone);
            if polled[0].revents != 0 {
                self.accept();
            }
        }
    }

    fn polled(&self) -> Vec<Polled> {
        let may_accept = Instant::now() >= self.accepts_from;
        let mut polled = vec![
            system::polled(self.listener.as_raw_fd(), may_accept, false),
            system::polled(self.bell.as_raw_fd(), true, false),
        ];
        polled.extend(self.clients.iter().map(|client| {
            let writes = client.answer.is_some();
            system::polled(client.stream.as_raw_fd(), !writes, writes)
        }));
        polled
    }

    fn patience(&self) -> Duration {
        let now = Instant::now();
        let pause = (self.accepts_from > now).then_some(self.accepts_from);
        let next = self.clients.iter().map(|client| client.until).chain(pause).min();
        next.map_or(Duration::from_secs(3600), |until| until.saturating_duration_since(now))
    }

    /// Takes what connections there are, as many as there are places at once.
    fn accept(&mut self) {
        for _ in 0..CLIENTS_MAX {
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
            if self.clients.len() >= CLIENTS_MAX {
                self.clients.remove(0);
            }
            let until = Instant::now() + PATIENCE;
            let client = Client { stream, head: Vec::new(), answer: None, until, is_gone: false };
            self.clients.push(client);
        }
    }
}

impl Client {
    /// Reads or writes as far as it goes without waiting.
    fn go_on(&mut self, served: &dyn Served) {
        if self.answer.is_none() && self.read() {
            let answer = answer(&self.head, served);
            self.answer = Some((answer, 0));
        }
        self.write();
    }

    /// True once the request's head is there, or is none.
    fn read(&mut self) -> bool {
        let mut buffer = [0; 1024];
        loop {
            if is_whole(&self.head) || self.head.len() > HEAD_MAX {
                return true;
            }
            match self.stream.read(&mut buffer) {
                Ok(count) if count > 0 => self.head.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Ok(_) | Err(_) => {
                    self.is_gone = true;
                    return false;
                }
            }
        }
    }

    fn write(&mut self) {
        let Some((bytes, written)) = &mut self.answer else { return };
        while *written < bytes.len() {
            match self.stream.write(&bytes[*written..]) {
                Ok(count) if count > 0 => *written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => break,
            }
        }
        // What the client still says is taken, or the connection would be reset, and with it the
        // answer.
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        let mut rest = [0; 4096];
        for _ in 0..16 {
            if !matches!(self.stream.read(&mut rest), Ok(count) if count > 0) {
                break;
            }
        }
        self.is_gone = true;
    }
}

/// The empty line behind the head has come.
fn is_whole(head: &[u8]) -> bool {
    let end = |mark: &[u8]| head.windows(mark.len()).any(|bytes| bytes == mark);
    end(b"\r\n\r\n") || end(b"\n\n")
}

/// What a request gets.
fn answer(head: &[u8], served: &dyn Served) -> Vec<u8> {
    const TEXT: &str = "text/plain; charset=utf-8";
    const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
    if head.len() > HEAD_MAX {
        return reply("431 Request Header Fields Too Large", TEXT, "too long\n", true);
    }
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_ascii_whitespace();
    let (method, target, version) = (words.next(), words.next(), words.next());
    let is_http = version.is_some_and(|version| version.starts_with("HTTP/1."));
    let (Some(method), Some(target), true, None) = (method, target, is_http, words.next()) else {
        return reply("400 Bad Request", TEXT, "this is no request\n", true);
    };
    let with_body = match method {
        "GET" => true,
        "HEAD" => false,
        _ => return reply("405 Method Not Allowed", TEXT, "GET or HEAD\n", true),
    };
    match target.split('?').next() {
        Some("/metrics") => reply("200 OK", METRICS, &served.metrics(), with_body),
        Some("/healthz") => match served.health() {
            (true, text) => reply("200 OK", TEXT, &text, with_body),
            (false, text) => reply("503 Service Unavailable", TEXT, &text, with_body),
        },
        Some("/") => reply("200 OK", TEXT, "/metrics\n/healthz\n", with_body),
        _ => reply("404 Not Found", TEXT, "there are /metrics and /healthz\n", with_body),
    }
}

fn reply(status: &str, kind: &str, body: &str, with_body: bool) -> Vec<u8> {
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let mut bytes = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n",
        body.len()
    )
    .into_bytes();
    if with_body {
        bytes.extend_from_slice(body.as_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;

    impl Served for Fixed {
        fn metrics(&self) -> String {
            "a 1\n".into()
        }

        fn health(&self) -> (bool, String) {
            (false, "stuck\n".into())
        }
    }

    fn status(request: &[u8]) -> String {
        let text = String::from_utf8(answer(request, &Fixed)).expect("text");
        text.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn requests_get_what_they_ask_for_and_garbage_is_told_so() {
        assert_eq!(status(b"GET /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 200 OK");
        assert_eq!(status(b"GET /metrics?x=1 HTTP/1.0\r\n\r\n"), "HTTP/1.1 200 OK");
        assert_eq!(status(b"GET /healthz HTTP/1.1\n\n"), "HTTP/1.1 503 Service Unavailable");
        assert_eq!(status(b"GET /other HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 Not Found");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
        for garbage in [&b"\xFF\xFE\n\n"[..], b"\n\n", b"GET\n\n", b"GET / FTP/1\n\n"] {
            assert_eq!(status(garbage), "HTTP/1.1 400 Bad Request");
        }
        let long = vec![b'a'; HEAD_MAX + 1];
        assert_eq!(status(&long), "HTTP/1.1 431 Request Header Fields Too Large");
        let head = String::from_utf8(answer(b"HEAD /metrics HTTP/1.1\r\n\r\n", &Fixed));
        let head = head.expect("text");
        assert!(head.contains("Content-Length: 4\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    }
}
