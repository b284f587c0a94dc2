//! The control socket: how a running job is asked and told things from outside, by its name.
//!
//! Each job has one Unix stream socket, `NAME.sock`, in the first usable of these folders:
//! `$XDG_RUNTIME_DIR/testudo`, `/run/testudo` (where an administrator made it, for services), and
//! `testudo-UID` in the temporary folder. Whoever looks for a job looks in all of them. A client
//! writes one JSON object on a line, a [`Request`](protocol::Request), and gets one back, a
//! [`Reply`](protocol::Reply); as often as it likes.
//!
//! Invariants: only the same user and root are heard (mode 0600, and the peer's user is checked);
//! a socket under its final name has a listener, or its job is dead and the socket stale; what
//! comes in is limited in length, number and time, and never ends the job.
//!
//! `protocol` is what is said, `folder` where sockets lie, `socket` the job's end of it, `serve`
//! its thread, `client` the other end, `system` the system calls.
//!
//! The supervisor opens a [`ControlSocket`](socket::ControlSocket) and answers in its loop; the
//! `testudo` tool is the client.

pub mod history;

pub mod protocol;

pub mod folder;

pub mod socket;

mod serve;

pub mod client;

pub(crate) mod system;
