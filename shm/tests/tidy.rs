//! House rules that neither the compiler nor clippy checks, for every crate of the workspace: each
//! file says what it is, nothing is left half done, each unsafe block says why it is sound, and
//! each pair of synchronising accesses is named on both sides.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Longest line, in characters.
const COLUMNS: usize = 100;

/// Longest function, in lines.
const FUNCTION_LINES: usize = 70;

/// Functions that are longer all the same. This list may only shrink.
const LONG_FUNCTIONS: [&str; 0] = [];

/// How far above an unsafe block its reason may stand.
const SAFETY_WITHIN: usize = 6;

struct Source {
    /// From the workspace's root.
    name: String,
    lines: Vec<String>,
}

/// Every Rust file under the sources of the workspace's crates.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut folders: Vec<PathBuf> = ["shm/src", "shm/derive/src", "state/src", "runtime/src"]
        .iter()
        .chain(&["perf/src"])
        .map(|name| root.join(name))
        .collect();
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("UTF-8");
                let name = path.strip_prefix(root).expect("inside").display().to_string();
                sources.push(Source { name, lines: text.lines().map(str::to_owned).collect() });
            }
        }
    }
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(sources.len() > 40, "only {} files were found", sources.len());
    sources
}

/// Collects what `find` says about each file: (line number, message).
fn check(rule: &str, find: impl Fn(&Source) -> Vec<(usize, String)>) {
    let mut offences = Vec::new();
    for source in sources() {
        for (line, message) in find(&source) {
            offences.push(format!("{}:{}: {message}", source.name, line + 1));
        }
    }
    assert!(offences.is_empty(), "{rule}:\n{}\n", offences.join("\n"));
}

/// A line without its comment and without what its string literals say.
fn code_of(line: &str) -> String {
    let mut code = String::new();
    let (mut in_string, mut previous) = (false, ' ');
    for character in line.chars() {
        if in_string {
            in_string = character != '"' || previous == '\\';
        } else if character == '"' && previous != '\'' {
            in_string = true;
        } else if character == '/' && previous == '/' {
            code.pop();
            break;
        } else {
            code.push(character);
        }
        previous = if character == '\\' && previous == '\\' { ' ' } else { character };
    }
    code
}

#[test]
fn every_file_says_first_what_it_is() {
    check("a file opens with //! and a sentence", |source| {
        let first = source.lines.first().map_or("", String::as_str);
        let says = first.strip_prefix("//! ").is_some_and(|text| text.len() > 10);
        if says { vec![] } else { vec![(0, format!("opens with {first:?}"))] }
    });
}

#[test]
fn no_line_is_longer_than_a_hundred_columns() {
    check("lines have 100 columns at most", |source| {
        let lines = source.lines.iter().enumerate();
        let long = lines.filter(|(_, line)| line.chars().count() > COLUMNS);
        // A link or a long literal cannot be broken.
        let breakable = long.filter(|(_, line)| {
            let is_link = line.contains("https://") || line.contains("http://");
            let is_text = line.trim_start().starts_with('"') || line.contains("r#\"");
            !is_link && !is_text
        });
        breakable.map(|(at, line)| (at, format!("{} columns", line.chars().count()))).collect()
    });
}

/// The name of the function that a line begins.
fn function_name(line: &str) -> Option<&str> {
    let mut rest = line.trim_start();
    loop {
        let (word, after) = rest.split_once(' ')?;
        if word == "fn" {
            let end = after.find(|c: char| !c.is_alphanumeric() && c != '_')?;
            return Some(&after[..end]);
        }
        let is_modifier = word.starts_with("pub") || ["const", "async", "unsafe"].contains(&word);
        let is_abi = word == "extern" || word.starts_with('"') || word.ends_with(')');
        if !is_modifier && !is_abi {
            return None;
        }
        rest = after;
    }
}

/// Functions of a file with more than [`FUNCTION_LINES`] lines: (line number, name, lines). Relies
/// on rustfmt: the closing brace has the indentation of the line that begins the function.
fn long_functions(source: &Source) -> Vec<(usize, String, usize)> {
    let mut long = Vec::new();
    for (at, line) in source.lines.iter().enumerate() {
        let Some(name) = function_name(line) else { continue };
        let indent = line.len() - line.trim_start().len();
        let end = format!("{}}}", " ".repeat(indent));
        let ends = |line: &String| *line == end;
        let is_declaration = source.lines[at..]
            .iter()
            .find(|line| line.trim_end().ends_with(';') || line.trim_end().ends_with('{'));
        if is_declaration.is_some_and(|line| line.trim_end().ends_with(';')) {
            continue;
        }
        let lines = source.lines[at..].iter().position(ends).map_or(1, |last| last + 1);
        if lines > FUNCTION_LINES {
            long.push((at, name.to_owned(), lines));
        }
    }
    long
}

#[test]
fn every_function_fits_a_screen() {
    let allowed = |source: &Source, name: &str| {
        LONG_FUNCTIONS.contains(&format!("{} {name}", source.name).as_str())
    };
    check("functions have 70 lines at most", |source| {
        let long = long_functions(source).into_iter();
        let long = long.filter(|(_, name, _)| !allowed(source, name));
        long.map(|(at, name, lines)| (at, format!("{name} has {lines} lines"))).collect()
    });
    let all: Vec<String> = sources()
        .iter()
        .flat_map(|source| {
            let long = long_functions(source).into_iter();
            long.map(|(_, name, _)| format!("{} {name}", source.name)).collect::<Vec<_>>()
        })
        .collect();
    let fixed: Vec<_> =
        LONG_FUNCTIONS.iter().filter(|name| !all.contains(&(**name).to_owned())).collect();
    assert!(fixed.is_empty(), "short by now, take them off the list: {fixed:?}");
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    check("unsafe needs a SAFETY comment above", |source| {
        let mut offences = Vec::new();
        for (at, line) in source.lines.iter().enumerate() {
            let code = code_of(line);
            if !code.contains("unsafe {") && !code.contains("unsafe impl") {
                continue;
            }
            let above = &source.lines[at.saturating_sub(SAFETY_WITHIN)..=at];
            if !above.iter().any(|line| line.contains("SAFETY:")) {
                offences.push((at, line.trim().to_owned()));
            }
        }
        offences
    });
}

#[test]
fn every_unsafe_function_says_what_it_asks_for() {
    check("an unsafe fn needs a # Safety section", |source| {
        let mut offences = Vec::new();
        for (at, line) in source.lines.iter().enumerate() {
            let code = code_of(line);
            let is_public = code.trim_start().starts_with("pub");
            if !is_public || !code.contains("unsafe fn ") {
                continue;
            }
            let above = source.lines[..at].iter().rev();
            let mut docs = above.take_while(|line| {
                let line = line.trim_start();
                line.starts_with("///") || line.starts_with("#[")
            });
            if !docs.any(|line| line.contains("# Safety")) {
                offences.push((at, line.trim().to_owned()));
            }
        }
        offences
    });
}

#[test]
fn atomics_come_through_one_door() {
    check("use testudo_shm::primitive, which loom can take the place of", |source| {
        let lines = source.lines.iter().enumerate();
        let is_door = source.name == "shm/src/primitive.rs";
        let foreign = lines.filter(|(_, line)| {
            let code = code_of(line);
            !is_door && (code.contains("std::sync::atomic") || code.contains("core::sync::atomic"))
        });
        foreign.map(|(at, line)| (at, line.trim().to_owned())).collect()
    });
}

#[test]
fn every_synchronising_pair_is_named_on_both_sides() {
    let mut sides: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for (at, line) in source.lines.iter().enumerate() {
            let Some((_, rest)) = line.split_once("SYNC ") else { continue };
            let Some((name, _)) = rest.split_once(':') else {
                panic!("{}:{}: SYNC without a name", source.name, at + 1);
            };
            sides.entry(name.to_owned()).or_default().push(format!("{}:{}", source.name, at + 1));
        }
    }
    assert!(sides.len() >= 3, "only {sides:?}");
    let lonely: Vec<_> = sides.iter().filter(|(_, places)| places.len() < 2).collect();
    assert!(lonely.is_empty(), "named on one side only: {lonely:?}");
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["TODO", "FIXME", "XXX", "todo!", "unimplemented!"];
    let phrases = ["for now", "placeholder", "not implemented", "not yet implemented"];
    check("finish it, or say plainly what it does not do", |source| {
        let mut offences = Vec::new();
        for (at, line) in source.lines.iter().enumerate() {
            let comment = line.split_once("//").map_or("", |(_, comment)| comment).to_lowercase();
            let found = words.iter().find(|word| line.contains(**word));
            let found = found.or_else(|| phrases.iter().find(|phrase| comment.contains(**phrase)));
            offences.extend(found.map(|found| (at, format!("{found:?}"))));
        }
        offences
    });
}

/// The rules find what they are there to find.
#[test]
fn the_rules_see_an_offence() {
    assert_eq!(code_of(r#"let a = "unsafe {"; // unsafe {"#), "let a = ; ");
    assert_eq!(code_of("unsafe { a }"), "unsafe { a }");
    assert_eq!(function_name("    pub(crate) const unsafe fn name<T>("), Some("name"));
    assert_eq!(function_name("    let function = fn_name(3);"), None);
    let mut lines = vec!["fn long() {".to_owned()];
    lines.extend((0..FUNCTION_LINES).map(|_| "    x();".to_owned()));
    lines.push("}".to_owned());
    let source = Source { name: "x.rs".into(), lines };
    assert_eq!(long_functions(&source), [(0, "long".to_owned(), FUNCTION_LINES + 2)]);
}
