//! The command line that every job has.
//!
//! Called by `testudo::main`.

use crate::config::SettingsArgs;
use crate::error::Error;
use crate::flow::Flow;
use crate::keeper::{self, Line};
use crate::supervisor::launch::Launch;
use crate::supervisor::watch::Events;
use crate::worker::{entry, inspect};
use clap::{Args, CommandFactory, FromArgMatches, Parser};
use std::process::ExitCode;
use std::sync::Arc;

/// A job without options of its own.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct NoOptions {}

#[derive(Debug, Parser)]
struct Command<O: Args> {
    #[command(flatten)]
    options: O,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What `--help` begins with.
const ABOUT: &str =
    "A Testudo job. Ctrl-C lets it finish what it has read; a second one ends it at once.";

/// Runs a job with the standard command line: the whole main of a job's program.
///
/// `build` describes the flow from the job's own options (a type that derives `clap::Args`). It
/// runs in the supervisor, which the launched process starts and replaces when it dies, and again
/// in every worker, and must describe the same flow each time.
pub fn main<O: Args>(build: impl Fn(&Flow, &O)) -> ExitCode {
    main_with(build, |_, _| Ok(()))
}

/// As [`main`], calling `after` once the job has ended well, in the process that led it last.
pub fn main_with<O: Args>(
    build: impl Fn(&Flow, &O),
    after: impl FnOnce(&O, &crate::supervisor::report::Report) -> Result<(), String>,
) -> ExitCode {
    crate::init();
    run(build, after)
}

/// The rest of `main_with`, for which there is enough stack now.
#[inline(never)]
fn run<O: Args>(
    build: impl Fn(&Flow, &O),
    after: impl FnOnce(&O, &crate::supervisor::report::Report) -> Result<(), String>,
) -> ExitCode {
    let role = keeper::role::take();
    let program = role.as_ref().map_or_else(program_name, |role| role.name.clone());
    // Said here: the flattened arguments' own comments would stand in its place otherwise.
    let command = Command::<O>::command().about(ABOUT).long_about(None);
    let parsed = command
        .try_get_matches()
        .and_then(|matches| Command::<O>::from_arg_matches(&matches))
        .unwrap_or_else(|error| match inspect::asked() {
            Some(asked) => {
                inspect::refuse(asked, format!("it does not take the job's arguments: {error}"))
            }
            None => error.exit(),
        });
    if let Some(asked) = inspect::asked() {
        inspect::describe(asked, |flow, _| build(flow, &parsed.options));
    }
    if let Some(role) = entry::role() {
        entry::run(role, |flow, _| build(flow, &parsed.options));
    }
    let done = match role {
        None => match begin(&program, parsed, &build) {
            Ok(true) => return keeper::keep(&program),
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        },
        Some(role) => lead(role, &program, parsed, &build, after),
    };
    let code = match done {
        Ok(()) => 0,
        Err(error) => {
            crate::say!("{program}: {error}");
            error.exit_code()
        }
    };
    // Who has led the job ends it; who could not take it over leaves it to the next.
    if let Some(line) = keeper::line().filter(|line| line.is_leader()) {
        line.over(code);
    }
    ExitCode::from(code)
}

/// In the launched process: says what is wrong with the settings, or explains the job. True when
/// there is a job to keep.
fn begin<O: Args>(
    program: &str,
    parsed: Command<O>,
    build: &impl Fn(&Flow, &O),
) -> Result<bool, Error> {
    let settings = parsed.settings.resolve(program)?;
    if !settings.explain {
        return Ok(true);
    }
    let launch = Launch { settings, parameters: String::new(), entry: 0, keeper: None };
    let text = launch.explain(|flow: &Flow| build(flow, &parsed.options))?;
    // A reader that has seen enough of it is no error.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
    Ok(false)
}

/// In a supervisor: leads the job to its end.
fn lead<O: Args>(
    role: keeper::role::Role,
    program: &str,
    parsed: Command<O>,
    build: &impl Fn(&Flow, &O),
    after: impl FnOnce(&O, &crate::supervisor::report::Report) -> Result<(), String>,
) -> Result<(), Error> {
    crate::supervisor::launch::name_supervisor();
    let line: &'static Line = keeper::line::open(role)?;
    crate::testing::arm_supervisor();
    let settings = parsed.settings.resolve(program)?;
    let options = parsed.options;
    let draw = |flow: &Flow| build(flow, &options);
    let form = settings.report;
    let launch = Launch { settings, parameters: String::new(), entry: 0, keeper: Some(line) };
    let report = launch.run(draw, Arc::<Events>::default(), |_| ())?;
    line.ending()?;
    crate::say_part!("{}", report.text(form));
    after(&options, &report).map_err(|message| Error::job("after the job", message))?;
    match report.put_aside() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// The program's file name: the job's default name.
pub(crate) fn program_name() -> String {
    let first = std::env::args_os().next().unwrap_or_default();
    let path = std::path::Path::new(&first);
    path.file_stem().map_or("job".into(), |name| name.to_string_lossy().into_owned())
}
