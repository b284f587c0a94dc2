//! What the tool does with running jobs: lists them, asks one and prints what it says.
//!
//! Called by `tool`.

use super::{Ended, Out, show};
use crate::checkpoint::history::State;
use crate::control::client;
use crate::control::folder::candidates;
use crate::control::protocol::{Reply, Request, Status};
use serde::Serialize;
use std::path::PathBuf;

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
        _ => Ok(()),
    }
}

fn unexpected(reply: &Reply) -> String {
    format!("an answer to another question: {reply:?}")
}
