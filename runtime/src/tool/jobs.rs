//! What the tool does with running jobs: lists them, asks one and prints what it says.
//!
//! Called by `tool`.

use super::{Ended, Out, show};
use crate::checkpoint::history::State;
use crate::control::client;
use crate::control::folder::candidates;
use crate::control::protocol::{Reply, Request, Status};
use serde::Serialize;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A job in the list.
#[derive(Debug, Serialize)]
pub(super) struct Listed {
    /// The name that it is found by.
    pub(super) name: String,
    /// Its socket.
    pub(super) socket: PathBuf,
    /// How it is going, where it says so.
    #[serde(flatten)]
    pub(super) answer: Answer,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    Status(Box<Status>),
    Error(String),
}

/// Lists all running jobs. One that does not answer is listed with what happened.
pub(super) fn list(out: &mut Out) -> Result<(), Ended> {
    let listed = client::jobs(&candidates()).into_iter().map(|job| {
        let answer = match client::ask_at(&job.path, &Request::Status) {
            Ok(Reply::Status(status)) => Answer::Status(status),
            Ok(Reply::Error { message }) => Answer::Error(message),
            Ok(other) => Answer::Error(unexpected(&other)),
            Err(failure) => Answer::Error(failure.to_string()),
        };
        Listed { name: job.name, socket: job.path, answer }
    });
    if out.as_json {
        for job in listed {
            out.json(&job)?;
        }
        return Ok(());
    }
    out.print(&show::list(&listed.collect::<Vec<_>>()))
}

/// Asks a job and prints its answer.
pub(super) fn ask(out: &mut Out, job: &str, request: &Request) -> Result<(), Ended> {
    let reply = client::ask(&candidates(), job, request)?;
    if let Reply::Error { message } = &reply {
        if out.as_json {
            out.json(&reply)?;
        }
        return Err(Ended::refused(format!("{job}: {message}")));
    }
    if out.as_json {
        out.json(&reply)?;
    } else {
        out.print(&show::reply(&reply))?;
    }
    match &reply {
        Reply::Taken { checkpoint, .. } => match &checkpoint.state {
            State::Complete => Ok(()),
            State::Failed(why) => {
                Err(Ended::refused(format!("{job}: checkpoint {} failed: {why}", checkpoint.id)))
            }
            State::Open => Err(Ended::refused(format!("{job}: {}", unexpected(&reply)))),
        },
        Reply::Updated { rolled_back: Some(why), .. } => Err(Ended::rolled_back(format!(
            "{job}: the update was rolled back, the job runs its old program: {why}"
        ))),
        _ => Ok(()),
    }
}

/// How long another supervisor may take to lead, and the program before to come back.
const PATIENCE: Duration = Duration::from_secs(30);

/// Brings another program to lead a job, and waits until it does.
pub(super) fn upgrade(out: &mut Out, job: &str, program: Option<PathBuf>) -> Result<(), Ended> {
    let reply = client::ask(&candidates(), job, &Request::UpgradeSupervisor { program })?;
    let Reply::Upgrading { supervisor, program } = &reply else {
        return Err(Ended::refused(match reply {
            Reply::Error { message } => format!("{job}: {message}"),
            other => unexpected(&other),
        }));
    };
    let begun = Instant::now();
    let leader = loop {
        // Nobody may answer for a moment.
        match client::ask(&candidates(), job, &Request::Status) {
            Ok(Reply::Status(status)) if status.supervisor != *supervisor => {
                break status.supervisor;
            }
            _ if begun.elapsed() > PATIENCE => {
                return Err(Ended::refused(format!("{job}: nobody leads it; see what it says")));
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let file = |path: PathBuf| fs::metadata(path).ok().map(|at| (at.dev(), at.ino()));
    if file(format!("/proc/{leader}/exe").into()) != file(program.clone()) {
        return Err(Ended::refused(format!(
            "{job}: {} did not take the job over; the program before leads again, and the job \
             says why",
            program.display()
        )));
    }
    if out.as_json { out.json(&reply) } else { out.print(&show::reply(&reply)) }
}

fn unexpected(reply: &Reply) -> String {
    format!("an answer to another question: {reply:?}")
}
