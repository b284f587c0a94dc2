//! The control socket and the `testudo` tool: who is heard, what is answered, what stale, foreign,
//! malformed and doubled things lead to. A thread stands for the job's loop.

mod common;

use common::tool::{said, tool, tool_command};
use common::{Jobs, PATIENCE, folder, trials, wait_for};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::JoinHandle;
use testudo::checkpoint::history::{Kind, Measure, Record, State};
use testudo::checkpoint::schedule::Schedule;
use testudo::control::client::{self, Failure};
use testudo::control::protocol::{Checkpoints, Order, REQUEST_MAX, Reply, Request, Status};
use testudo::control::socket::{ControlSocket, ReplyTo};
use testudo::serde_json::{self, Value, json};

const JOBS: Jobs = &[];

fn main() -> ExitCode {
    testudo::init();
    common::host(
        JOBS,
        trials![
            a_request_is_answered_by_whoever_takes_it,
            a_socket_is_its_users_alone_whatever_the_umask,
            another_user_is_not_heard,
            a_stale_socket_is_recognised_and_removed,
            a_stale_socket_gives_its_name_to_the_next_job,
            a_file_that_is_no_socket_is_left_alone,
            a_folder_that_others_can_write_to_is_not_used,
            two_jobs_of_one_name_are_both_found,
            a_long_name_in_a_long_folder_is_found,
            what_is_no_request_is_answered_with_an_error,
            a_request_without_end_is_refused,
            requests_in_one_write_are_answered_in_order,
            a_client_that_has_said_all_gets_its_answer,
            a_client_that_left_before_its_answer_does_no_harm,
            a_request_that_is_dropped_is_answered_with_an_error,
            more_clients_than_there_is_room_for_are_told_so,
            a_socket_goes_with_its_job_and_no_other_does,
            a_job_ends_with_clients_connected,
            an_answer_that_is_none_is_an_error,
            the_tool_lists_jobs,
            the_tool_shows_how_a_job_goes,
            the_tool_takes_checkpoints_and_says_when_they_fail,
            the_tool_changes_the_schedule,
            the_tool_shows_the_history,
            the_tool_says_what_the_job_refuses,
            the_tool_says_which_jobs_there_are,
            the_tool_refuses_what_it_does_not_know,
            the_tool_does_not_mind_a_reader_that_leaves,
        ],
    )
}

fn record(id: u64, state: State) -> Record {
    Record {
        id,
        kind: Kind::Regional,
        begun_unix_ms: 1_763_632_800_000,
        regions_ok: 2,
        regions_failed: 1,
        duration_us: 12_300,
        measure: Measure { bytes_full: 1 << 20, ..Measure::default() },
        state,
    }
}

/// What the job of these tests answers.
fn answer(name: &str, request: &Request) -> Reply {
    match request {
        Request::Status => Reply::Status(Box::new(Status {
            name: name.into(),
            pid: std::process::id(),
            workers: 3,
            records_in: 12_345,
            checkpoints: Some(Checkpoints { folder: "/ck".into(), ..Checkpoints::default() }),
            ..Status::default()
        })),
        Request::Checkpoint { order: Order::Now } => {
            let state = match name {
                "unlucky" => State::Failed("region 0: late".into()),
                _ => State::Complete,
            };
            Reply::Taken { checkpoint: record(7, state), path: Some("/ck/7".into()) }
        }
        Request::Checkpoint { order: Order::Schedule(schedule) } => {
            Reply::Schedule { schedule: schedule.clone(), next_in_ms: Some(1500) }
        }
        Request::Checkpoint { order: Order::History } => Reply::History {
            schedule: Schedule::Never,
            checkpoints: vec![record(6, State::Failed("disk full".into())), record(7, State::Open)],
        },
        Request::Postmortem => Reply::Postmortem { deaths: Vec::new(), events: Vec::new() },
        Request::Savepoint => Reply::error("this job has no --checkpoint-dir"),
        _ => Reply::error("not in these tests"),
    }
}

/// A socket, and a thread that answers in the place of a job's loop.
struct Job {
    socket: Option<ControlSocket>,
    stop: crossbeam::channel::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Job {
    fn start(folder: &Path, name: &str) -> Self {
        let socket = ControlSocket::open_in(folder, name, || ()).expect("a socket");
        let requests = socket.requests().clone();
        let name = name.to_owned();
        let (stop, stopped) = crossbeam::channel::bounded(0);
        let thread = std::thread::spawn(move || {
            loop {
                crossbeam::channel::select! {
                    recv(requests) -> request => match request {
                        Ok((request, reply_to)) => reply_to.send(answer(&name, &request)),
                        Err(_) => return,
                    },
                    recv(stopped) -> _ => return,
                }
            }
        });
        Self { socket: Some(socket), stop, thread: Some(thread) }
    }

    fn socket(&self) -> &ControlSocket {
        self.socket.as_ref().expect("it runs")
    }

    fn connect(&self) -> Client {
        Client::connect(self.socket().path())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.socket = None;
        let (stop, _) = crossbeam::channel::bounded(0);
        self.stop = stop;
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the loop ends well");
        }
    }
}

/// A client that says what it likes.
struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("somebody listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time");
        let lines = BufReader::new(stream.try_clone().expect("a descriptor"));
        Self { stream, lines }
    }

    fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("it is heard");
    }

    fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn error(&mut self) -> String {
        let reply = self.hear();
        assert_eq!(reply["reply"], "error", "{reply}");
        reply["message"].as_str().expect("text").to_owned()
    }

    fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        // A connection that is closed before all was read is reset.
        self.lines.read_to_end(&mut rest).map_or(true, |count| count == 0)
    }
}

fn status_line() -> &'static [u8] {
    b"{\"request\":\"status\"}\n"
}

/// A folder for sockets, as the tool finds it, and what `XDG_RUNTIME_DIR` is to be.
fn place() -> (tempfile::TempDir, PathBuf) {
    let at = folder();
    let sockets = at.path().join("testudo");
    (at, sockets)
}

fn a_request_is_answered_by_whoever_takes_it() {
    let (_at, sockets) = place();
    let (wake, woken) = crossbeam::channel::unbounded();
    let wake = move || wake.send(()).expect("heard");
    let socket = ControlSocket::open_in(&sockets, "flights", wake).expect("a socket");
    assert_eq!(socket.name(), "flights");
    let asked = std::thread::spawn({
        let sockets = sockets.clone();
        move || client::ask(&[sockets], "flights", &Request::Status)
    });
    woken.recv_timeout(PATIENCE).expect("the loop is woken");
    let (request, reply_to) = socket.requests().try_recv().expect("after the request is there");
    assert_eq!(request, Request::Status);
    reply_to.send(answer("flights", &request));
    let reply = asked.join().expect("no panic").expect("an answer");
    assert_eq!(reply, answer("flights", &Request::Status));
}

fn a_socket_is_its_users_alone_whatever_the_umask() {
    let (_at, sockets) = place();
    // SAFETY: a plain system call; tests of this program run one at a time.
    let before = unsafe { libc::umask(0) };
    let job = Job::start(&sockets, "open");
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(job.socket().path()), 0o600);
    assert_eq!(mode(&sockets), 0o700);
}

fn another_user_is_not_heard() {
    // SAFETY: a call without arguments.
    if unsafe { libc::geteuid() } != 0 {
        // Only root can pretend to be another user.
        return;
    }
    let (at, sockets) = place();
    let job = Job::start(&sockets, "private");
    let path = job.socket().path().to_owned();
    let other = || {
        let path = path.clone();
        std::thread::spawn(move || {
            // SAFETY: a plain system call; unlike the library's function it changes this thread
            // alone.
            let done = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
            assert_eq!(done, 0);
            UnixStream::connect(path)
        })
        .join()
        .expect("no panic")
    };
    assert!(other().is_err(), "the folder keeps others out");
    // Even where an administrator opened all doors.
    for (path, mode) in [(at.path(), 0o755), (&sockets, 0o755), (&path, 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
    }
    let mut answer = String::new();
    let mut stream = other().expect("the doors are open");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time");
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains("user 65534 may not ask this job"), "{answer}");
    let mut own = job.connect();
    own.say(status_line());
    assert_eq!(own.hear()["reply"], "status");
}

/// A socket whose listener has gone, as a killed job leaves it.
fn stale(sockets: &Path, file: &str) -> PathBuf {
    fs::create_dir_all(sockets).expect("room");
    fs::set_permissions(sockets, fs::Permissions::from_mode(0o700)).expect("ours");
    let path = sockets.join(file);
    drop(UnixListener::bind(&path).expect("room"));
    assert!(fs::metadata(&path).expect("it stays").file_type().is_socket());
    path
}

fn a_stale_socket_is_recognised_and_removed() {
    let (_at, sockets) = place();
    let dead = stale(&sockets, "dead.sock");
    let job = Job::start(&sockets, "alive");
    let folders = [sockets.clone()];
    match client::ask(&folders, "dead", &Request::Status) {
        Err(Failure::NoJob { name, others }) => {
            assert_eq!((name.as_str(), others), ("dead", vec!["alive".to_owned()]));
        }
        other => panic!("{other:?}"),
    }
    assert!(!dead.exists());
    let jobs = client::jobs(&folders);
    assert_eq!(jobs.len(), 1);
    assert_eq!(jobs[0].path, job.socket().path());
}

fn a_stale_socket_gives_its_name_to_the_next_job() {
    let (_at, sockets) = place();
    stale(&sockets, "again.sock");
    let job = Job::start(&sockets, "again");
    assert_eq!(job.socket().name(), "again");
    assert!(client::ask(&[sockets], "again", &Request::Status).is_ok());
}

fn a_file_that_is_no_socket_is_left_alone() {
    let (_at, sockets) = place();
    fs::create_dir(&sockets).expect("room");
    let path = sockets.join("notes.sock");
    fs::write(&path, "mine").expect("room");
    let error = ControlSocket::open_in(&sockets, "notes", || ()).expect_err("it is in the way");
    assert!(error.to_string().contains("notes.sock is not a socket; remove it"), "{error}");
    assert_eq!(fs::read_to_string(&path).expect("still there"), "mine");
    assert_eq!(client::jobs(&[sockets]), []);
}

fn a_folder_that_others_can_write_to_is_not_used() {
    let (_at, sockets) = place();
    fs::create_dir(&sockets).expect("room");
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o777)).expect("ours");
    let error = ControlSocket::open_in(&sockets, "job", || ()).expect_err("anybody's folder");
    assert!(error.to_string().contains("only this user can write to"), "{error}");
}

fn two_jobs_of_one_name_are_both_found() {
    let (_at, sockets) = place();
    let first = Job::start(&sockets, "twin");
    let second = Job::start(&sockets, "twin");
    let third = Job::start(&sockets, "twin");
    let pid = std::process::id();
    assert_eq!(first.socket().name(), "twin");
    assert_eq!(second.socket().name(), format!("twin-{pid}"));
    assert_eq!(third.socket().name(), format!("twin-{pid}-2"));
    let folders = [sockets.clone()];
    for job in [&first, &second, &third] {
        assert!(client::ask(&folders, job.socket().name(), &Request::Status).is_ok());
    }
    drop(first);
    assert_eq!(client::jobs(&folders).len(), 2);
    assert_eq!(Job::start(&sockets, "twin").socket().name(), "twin");
}

fn a_long_name_in_a_long_folder_is_found() {
    let (at, _) = place();
    let mut long = at.path().to_owned();
    for _ in 0..4 {
        long.push("x".repeat(60));
        fs::create_dir(&long).expect("room");
    }
    let sockets = long.join("testudo");
    let name = "a job with a name that is as long as names can be ".repeat(8);
    let _job = Job::start(&sockets, &name);
    let folders = [sockets];
    let reply = client::ask(&folders, &name, &Request::Status).expect("an answer");
    assert_eq!(reply, answer(&name, &Request::Status));
    let listed = client::jobs(&folders);
    assert!(client::ask(&folders, &listed[0].name, &Request::Status).is_ok(), "{listed:?}");
    assert!(client::ask_at(&listed[0].path, &Request::Status).is_ok());
}

fn what_is_no_request_is_answered_with_an_error() {
    let (_at, sockets) = place();
    let job = Job::start(&sockets, "patient");
    let mut client = job.connect();
    let nested = "[".repeat(10_000);
    let bad: [&[u8]; 12] = [
        b"",
        b"status",
        b"{}",
        b"[]",
        b"null",
        b"{\"request\":\"song\"}",
        b"{\"request\":5}",
        b"{\"request\":\"checkpoint\"}",
        b"{\"request\":\"checkpoint\",\"order\":{\"schedule\":\"soon\"}}",
        b"{\"request\":\"status\"} {\"request\":\"status\"}",
        b"\xFF\xFE\0\x01",
        nested.as_bytes(),
    ];
    for bad in bad {
        client.say(&[bad, b"\n"].concat());
        let said = client.error();
        assert!(said.starts_with("this is no request: "), "{said}");
    }
    client.say(status_line());
    assert_eq!(client.hear()["reply"], "status", "it is served on");
}

fn a_request_without_end_is_refused() {
    let (_at, sockets) = place();
    let job = Job::start(&sockets, "bounded");
    for length in [REQUEST_MAX + 1, 2 << 20] {
        let mut client = job.connect();
        let endless = vec![b' '; length];
        // It is let go before it has said everything.
        let _ = client.stream.write_all(&endless);
        assert!(client.error().contains("16384 bytes at most"));
        assert!(client.is_closed());
    }
    let mut client = job.connect();
    let mut longest = vec![b' '; REQUEST_MAX - status_line().len()];
    longest.extend(status_line());
    client.say(&longest);
    assert_eq!(client.hear()["reply"], "status");
}

fn requests_in_one_write_are_answered_in_order() {
    let (_at, sockets) = place();
    let job = Job::start(&sockets, "pipe");
    let mut client = job.connect();
    let requests = [
        json!({"request": "status"}),
        json!({"request": "checkpoint", "order": "now"}),
        json!({"request": "nothing"}),
        json!({"request": "checkpoint", "order": {"schedule": "5m"}}),
    ];
    let text: String = requests.iter().map(|request| format!("{request}\n")).collect();
    client.say(text.as_bytes());
    for expected in ["status", "taken", "error", "schedule"] {
        assert_eq!(client.hear()["reply"], expected);
    }
    // Slowly, byte after byte, it is the same.
    for byte in status_line() {
        client.say(&[*byte]);
    }
    assert_eq!(client.hear()["reply"], "status");
}

fn a_client_that_has_said_all_gets_its_answer() {
    let (_at, sockets) = place();
    let socket = ControlSocket::open_in(&sockets, "half", || ()).expect("a socket");
    let mut client = Client::connect(socket.path());
    client.say(b"{\"request\":\"status\"}\n{\"request\":\"savepoint\"}");
    client.stream.shutdown(Shutdown::Write).expect("half of it");
    for expected in [Request::Status, Request::Savepoint] {
        let (request, reply_to) = take(&socket);
        assert_eq!(request, expected);
        reply_to.send(Reply::error("busy"));
        assert_eq!(client.error(), "busy");
    }
    assert!(client.is_closed());
}

fn take(socket: &ControlSocket) -> (Request, ReplyTo) {
    socket.requests().recv_timeout(PATIENCE).expect("a request")
}

fn a_client_that_left_before_its_answer_does_no_harm() {
    let (_at, sockets) = place();
    let socket = ControlSocket::open_in(&sockets, "left", || ()).expect("a socket");
    let mut gone = Client::connect(socket.path());
    gone.say(status_line());
    let (_, late) = take(&socket);
    drop(gone);
    let mut client = Client::connect(socket.path());
    client.say(status_line());
    let (_, reply_to) = take(&socket);
    late.send(Reply::error("for somebody else"));
    reply_to.send(Reply::error("for this one"));
    assert_eq!(client.error(), "for this one");
}

fn a_request_that_is_dropped_is_answered_with_an_error() {
    let (_at, sockets) = place();
    let socket = ControlSocket::open_in(&sockets, "forgetful", || ()).expect("a socket");
    let mut client = Client::connect(socket.path());
    client.say(status_line());
    drop(take(&socket));
    assert_eq!(client.error(), "the job ended, or gave no answer");
}

fn more_clients_than_there_is_room_for_are_told_so() {
    let (_at, sockets) = place();
    let job = Job::start(&sockets, "popular");
    let mut clients: Vec<_> = (0..32).map(|_| job.connect()).collect();
    let mut late = job.connect();
    assert!(late.error().contains("ask again later"));
    assert!(late.is_closed());
    for client in &mut clients {
        client.say(status_line());
        assert_eq!(client.hear()["reply"], "status");
    }
    drop(clients);
    wait_for("room", || {
        let mut client = job.connect();
        let _ = client.stream.write_all(status_line());
        (client.hear()["reply"] == "status").then_some(())
    });
}

fn a_socket_goes_with_its_job_and_no_other_does() {
    let (_at, sockets) = place();
    let job = Job::start(&sockets, "leaving");
    let path = job.socket().path().to_owned();
    assert!(path.exists());
    drop(job);
    assert!(!path.exists());
    let job = Job::start(&sockets, "replaced");
    let path = job.socket().path().to_owned();
    fs::remove_file(&path).expect("ours");
    let _other = UnixListener::bind(&path).expect("room");
    drop(job);
    assert!(path.exists(), "it is not the job's any more");
    let left: Vec<_> =
        fs::read_dir(&sockets).expect("there").map(|e| e.expect("one").file_name()).collect();
    assert_eq!(left.len(), 2, "the lock and the other's: {left:?}");
}

fn a_job_ends_with_clients_connected() {
    let (_at, sockets) = place();
    let socket = ControlSocket::open_in(&sockets, "ending", || ()).expect("a socket");
    let mut idle = Client::connect(socket.path());
    let mut waiting = Client::connect(socket.path());
    waiting.say(status_line());
    let request = take(&socket);
    drop(socket);
    assert!(idle.is_closed());
    assert!(waiting.is_closed());
    drop(request);
}

fn an_answer_that_is_none_is_an_error() {
    let (_at, sockets) = place();
    fs::create_dir(&sockets).expect("room");
    let path = sockets.join("odd.sock");
    let listener = UnixListener::bind(&path).expect("room");
    let endless = vec![b'x'; 1 << 20];
    let answers: [&[u8]; 5] =
        [b"", b"\n", b"{\"reply\":\"status\"", b"{\"reply\":\"song\"}\n", &endless];
    for bytes in answers {
        let bytes = bytes.to_vec();
        let listener = listener.try_clone().expect("a descriptor");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let times = if bytes.len() > 1000 { 64 } else { 1 };
            // The client leaves when it has had enough.
            let _ = (0..times).try_for_each(|_| stream.write_all(&bytes));
        });
        match client::ask_at(&path, &Request::Status) {
            Err(Failure::Socket { path: at, why }) => {
                assert!(at == path && why.len() > 10, "{why}")
            }
            other => panic!("{other:?}"),
        }
        server.join().expect("no panic");
    }
}

fn the_tool_lists_jobs() {
    let (at, sockets) = place();
    assert_eq!(said(&tool(at.path(), &["list"])), (0, "no job is running\n".into(), "".into()));
    let _jobs = [Job::start(&sockets, "b"), Job::start(&sockets, "a")];
    stale(&sockets, "dead.sock");
    let (code, out, _) = said(&tool(at.path(), &["list"]));
    let lines: Vec<_> = out.lines().map(|line| line.split_whitespace().next()).collect();
    assert_eq!((code, lines), (0, vec![Some("NAME"), Some("a"), Some("b")]), "{out}");
    assert!(out.contains("12345"), "{out}");
    let (code, out, _) = said(&tool(at.path(), &["list", "--json"]));
    let rows: Vec<Value> =
        out.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    assert_eq!((code, rows.len()), (0, 2));
    assert_eq!(rows[1]["name"], "b");
    assert_eq!(rows[1]["status"]["workers"], 3);
}

fn the_tool_shows_how_a_job_goes() {
    let (at, sockets) = place();
    let _job = Job::start(&sockets, "flights");
    let (code, out, _) = said(&tool(at.path(), &["status", "flights"]));
    assert_eq!(code, 0);
    assert!(out.contains("3 workers") && out.contains("12345 records in"), "{out}");
    assert!(out.contains("checkpoints in /ck: never"), "{out}");
    let (_, out, _) = said(&tool(at.path(), &["--json", "status", "flights"]));
    let status: Value = serde_json::from_str(&out).expect("an object");
    assert_eq!((&status["reply"], &status["records_in"]), (&json!("status"), &json!(12_345)));
}

fn the_tool_takes_checkpoints_and_says_when_they_fail() {
    let (at, sockets) = place();
    let _jobs = [Job::start(&sockets, "lucky"), Job::start(&sockets, "unlucky")];
    let (code, out, err) = said(&tool(at.path(), &["checkpoint", "lucky", "now"]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("complete") && out.contains("--resume-from /ck/7"), "{out}");
    let (code, out, err) = said(&tool(at.path(), &["checkpoint", "unlucky", "now", "--json"]));
    assert_eq!(
        (code, err.as_str()),
        (1, "testudo: unlucky: checkpoint 7 failed: region 0: late\n")
    );
    let taken: Value = serde_json::from_str(&out).expect("an object");
    assert_eq!(taken["checkpoint"]["state"], "failed");
}

fn the_tool_changes_the_schedule() {
    let (at, sockets) = place();
    let _job = Job::start(&sockets, "list");
    let cases = [
        (&["checkpoint", "--", "list", "every", "5s"][..], "5s"),
        (&["checkpoint", "--", "list", "at", "0 * * * *"], "0 * * * *"),
        (&["checkpoint", "--", "list", "never"], "never"),
    ];
    for (words, schedule) in cases {
        let (code, out, err) = said(&tool(at.path(), words));
        let expected = format!("checkpoints: {schedule}, the next in 1.5 s\n");
        assert_eq!((code, out), (0, expected), "{err}");
    }
}

fn the_tool_shows_the_history() {
    let (at, sockets) = place();
    let _job = Job::start(&sockets, "old");
    let (code, out, _) = said(&tool(at.path(), &["checkpoint", "old", "history"]));
    assert_eq!((code, out.lines().count()), (0, 4), "{out}");
    assert!(out.contains("2025-11-20T10:00:00Z  12.3 ms  2, 1 failed"), "{out}");
    assert!(out.contains("failed: disk full") && out.ends_with("schedule: never\n"), "{out}");
}

fn the_tool_says_what_the_job_refuses() {
    let (at, sockets) = place();
    let _job = Job::start(&sockets, "fresh");
    let (code, out, err) = said(&tool(at.path(), &["savepoint", "fresh"]));
    let expected = "testudo: fresh: this job has no --checkpoint-dir\n";
    assert_eq!((code, out.as_str(), err.as_str()), (1, "", expected));
    let (code, out, _) = said(&tool(at.path(), &["savepoint", "fresh", "--json"]));
    assert_eq!(code, 1);
    assert_eq!(serde_json::from_str::<Value>(&out).expect("an object")["reply"], "error");
}

fn the_tool_says_which_jobs_there_are() {
    let (at, sockets) = place();
    let (code, _, err) = said(&tool(at.path(), &["status", "nobody"]));
    assert_eq!(
        (code, err.as_str()),
        (3, "testudo: no job is called \"nobody\"; none is running\n")
    );
    let _job = Job::start(&sockets, "somebody");
    let (code, _, err) = said(&tool(at.path(), &["checkpoint", "nobody", "now"]));
    assert_eq!((code, err.contains("running: somebody")), (3, true), "{err}");
}

fn the_tool_refuses_what_it_does_not_know() {
    let at = folder();
    let bad = [
        &[][..],
        &["dance"],
        &["status"],
        &["checkpoint", "job", "soon"],
        &["checkpoint", "job", "every", "0s"],
        &["checkpoint", "job", "at", "61 * * * *"],
    ];
    for words in bad {
        let (code, out, err) = said(&tool(at.path(), words));
        assert_eq!((code, out.as_str()), (2, ""), "{words:?}: {err}");
        assert!(err.len() > 20, "{words:?}: {err}");
    }
}

fn the_tool_does_not_mind_a_reader_that_leaves() {
    let (at, sockets) = place();
    let _job = Job::start(&sockets, "loud");
    for words in [&["list"][..], &["list", "--json"], &["checkpoint", "loud", "history"]] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = tool_command(at.path(), words).stdout(writer).output().expect("it runs");
        assert_eq!(said(&output), (0, "".into(), "".into()), "{words:?}");
    }
}
