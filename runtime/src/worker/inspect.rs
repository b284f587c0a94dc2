//! A program is asked what it would do with a running job: it draws and plans the flow with the
//! job's settings and its own code, describes the plan in one JSON line, and ends. Nothing is
//! mapped writable, nothing of the job is touched.
//!
//! Called by `testudo::main` in the process that `supervisor/update.rs` starts; a job inside
//! another program says here that it has no way to be updated.

#![expect(unsafe_code, reason = "inherited descriptors")]

use crate::error::Error;
use crate::flow::Flow;
use crate::plan::Plan;
use crate::plan::described::Described;
use crate::supervisor::description::Description;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;

/// The environment variable of such a process: `PIPE_FD:CONTROL_FD:CONTROL_BYTES`.
pub(crate) const INSPECT: &str = "TESTUDO_INSPECT";

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    Plan(Box<Described>),
    Refused(String),
}

/// Where to answer, and where the job's description lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pipe: i32,
    control: i32,
    bytes: usize,
}

/// Whether this process was started to describe itself.
pub(crate) fn asked() -> Option<Asked> {
    let text = std::env::var(INSPECT).ok()?;
    let mut parts = text.split(':');
    let mut number = || parts.next()?.parse::<i64>().ok();
    Some(Asked {
        pipe: i32::try_from(number()?).ok()?,
        control: i32::try_from(number()?).ok()?,
        bytes: usize::try_from(number()?).ok()?,
    })
}

/// Describes what `build` draws, and ends the process.
pub(crate) fn describe(asked: Asked, build: impl FnOnce(&Flow, &str)) -> ! {
    match plan(asked, build) {
        Ok(described) => answer(asked, &Answer::Plan(Box::new(described)), 0),
        Err(error) => refuse(asked, error.to_string()),
    }
}

/// Says why there is nothing to describe, and ends the process.
pub(crate) fn refuse(asked: Asked, why: String) -> ! {
    answer(asked, &Answer::Refused(why), 1)
}

fn plan(asked: Asked, build: impl FnOnce(&Flow, &str)) -> Result<Described, Error> {
    // SAFETY: the supervisor left this descriptor open for us; nothing else in this process knows
    // it.
    let control = unsafe { OwnedFd::from_raw_fd(asked.control) };
    let (description, _control) = Description::read(control, asked.bytes)?;
    let settings = Rc::new(description.settings.clone());
    let flow = Flow::with_surveys(settings, description.surveys.clone());
    build(&flow, &description.parameters);
    let draft = flow.draft.borrow();
    let plan = Plan::new(&draft, &flow.settings)?;
    Ok(Described::of(&plan, |operator| {
        let list = draft.declared.iter().find(|(of, _)| *of == operator);
        list.map(|(_, list)| list()).unwrap_or_default()
    }))
}

fn answer(asked: Asked, answer: &Answer, code: i32) -> ! {
    // SAFETY: as above.
    let mut pipe = unsafe { File::from_raw_fd(asked.pipe) };
    let line = serde_json::to_string(answer).unwrap_or_default() + "\n";
    // Nobody to hear it is nobody to tell.
    let _ = pipe.write_all(line.as_bytes());
    std::process::exit(code)
}
