//! Reads the imports of `src/` and checks them against the layers that `ARCHITECTURE.md` describes: a file
//! imports only from its own layer or from lower ones, and no imports form a cycle.
//!
//! An import is a `use`, or a path that begins with `crate`, `super` or `self`, outside of code that is
//! compiled for tests only. A re-export counts as an import of the file that defines the item.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Attribute, Item, ItemUse, Macro, UseTree, Visibility,
    visit::{self, Visit},
};

/// The layers from the lowest to the highest, with the folders and files of `src/` that each holds.
const LAYERS: &[(&str, &[&str])] = &[
    ("domain", &["domain"]),
    ("infrastructure", &["audit", "crypto", "files", "store", "telemetry", "tls", "upstream"]),
    ("services", &["services"]),
    ("API", &["api"]),
    ("application", &["app", "cli", "config", "dev", "lifecycle"]),
];

/// A module's path below the crate, such as `["store", "leases"]`; empty for `lib.rs`.
type ModulePath = Vec<String>;

/// The modules that each module imports from.
type Imports = BTreeMap<ModulePath, BTreeSet<ModulePath>>;

/// Returns the path of the module `name` in `parent`.
fn child_of(parent: &ModulePath, name: &str) -> ModulePath {
    parent.iter().cloned().chain([name.to_owned()]).collect()
}

/// The imports of one file, not yet resolved.
#[derive(Default)]
struct SourceFile {
    /// Paths of imports, as they are written.
    paths: Vec<Vec<String>>,
    /// Re-exported names, and the paths that they stand for.
    re_exports: Vec<(String, Vec<String>)>,
    /// Child modules for tests only, each in a file of its own.
    test_modules: Vec<String>,
}

impl SourceFile {
    fn parse(text: &str) -> syn::Result<Self> {
        let mut file = Self::default();
        file.visit_file(&syn::parse_file(text)?);
        Ok(file)
    }

    /// Adds the paths in a macro's arguments, which the parser leaves as tokens.
    fn add_macro_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = vec![];
        let mut after_colon = false;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) if path.is_empty() || after_colon => {
                    path.push(ident.to_string());
                    after_colon = false;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() => {
                    after_colon = true;
                }
                other => {
                    self.paths.push(std::mem::take(&mut path));
                    after_colon = false;
                    match other {
                        TokenTree::Group(group) => self.add_macro_tokens(group.stream()),
                        TokenTree::Ident(ident) => path.push(ident.to_string()),
                        _ => {}
                    }
                }
            }
        }
        self.paths.push(path);
    }
}

impl<'ast> Visit<'ast> for SourceFile {
    fn visit_item(&mut self, item: &'ast Item) {
        match item {
            item if !is_for_tests_only(attributes(item)) => visit::visit_item(self, item),
            Item::Mod(module) if module.content.is_none() => {
                self.test_modules.push(module.ident.to_string());
            }
            _ => {}
        }
    }

    /// Skips `pub(super)` and its like, which import nothing.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_for_tests_only(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let mut imported = vec![];
        flatten(&item.tree, &mut vec![], &mut imported);
        if !matches!(item.vis, Visibility::Inherited) {
            self.re_exports.extend(imported.iter().cloned());
        }
        self.paths.extend(imported.into_iter().map(|(_, path)| path));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.paths.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast Macro) {
        self.add_macro_tokens(item.tokens.clone());
    }
}

/// Returns the attributes of an item. It knows every kind of item that the project uses.
fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn is_for_tests_only(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Ident>().is_ok_and(|condition| condition == "test")
    })
}

/// Adds each name that `tree` imports, with its path.
fn flatten(tree: &UseTree, path: &mut Vec<String>, imported: &mut Vec<(String, Vec<String>)>) {
    let mut leaf = |name: String, last: Option<String>| {
        imported.push((name, path.iter().cloned().chain(last).collect()));
    };
    match tree {
        UseTree::Name(name) if name.ident == "self" => {
            leaf(path.last().cloned().unwrap_or_default(), None);
        }
        UseTree::Name(name) => leaf(name.ident.to_string(), Some(name.ident.to_string())),
        UseTree::Rename(rename) => leaf(rename.rename.to_string(), Some(rename.ident.to_string())),
        UseTree::Glob(_) => leaf("*".into(), None),
        UseTree::Path(next) => {
            path.push(next.ident.to_string());
            flatten(&next.tree, path, imported);
            path.pop();
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                flatten(tree, path, imported);
            }
        }
    }
}

/// Finds the module that an import refers to.
struct Resolver<'a> {
    files: &'a BTreeMap<ModulePath, SourceFile>,
    /// The module that defines what another module re-exports, by that module and the item's name.
    re_exports: BTreeMap<(ModulePath, String), ModulePath>,
}

impl<'a> Resolver<'a> {
    fn new(files: &'a BTreeMap<ModulePath, SourceFile>) -> Self {
        let mut resolver = Self { files, re_exports: BTreeMap::new() };
        // A re-export of a re-export needs a second round, and so on.
        for _ in 0..3 {
            for (module, file) in files {
                for (name, path) in &file.re_exports {
                    if let Some(target) = resolver.resolve(module, path) {
                        resolver.re_exports.insert((module.clone(), name.clone()), target);
                    }
                }
            }
        }
        resolver
    }

    /// Returns the module whose file defines the item that `path` names inside `module`; `None` for an
    /// item of another crate, and for one that `module` defines or imports.
    fn resolve(&self, module: &ModulePath, path: &[String]) -> Option<ModulePath> {
        let mut rest = path;
        let mut at = match rest.first()?.as_str() {
            "crate" => {
                rest = &rest[1..];
                vec![]
            }
            "self" => {
                rest = &rest[1..];
                module.clone()
            }
            "super" => {
                let ups = rest.iter().take_while(|segment| *segment == "super").count();
                rest = &rest[ups..];
                module[..module.len() - ups].to_vec()
            }
            first => {
                let child = child_of(module, first);
                if !self.files.contains_key(&child) {
                    return None;
                }
                module.clone()
            }
        };
        for segment in rest {
            let child = child_of(&at, segment);
            if self.files.contains_key(&child) {
                at = child;
            } else if let Some(target) = self.re_exports.get(&(at.clone(), segment.clone())) {
                at.clone_from(target);
            } else {
                break;
            }
        }
        Some(at).filter(|at| at != module)
    }
}

fn imports(files: &BTreeMap<ModulePath, SourceFile>) -> Imports {
    let resolver = Resolver::new(files);
    files
        .iter()
        .map(|(module, file)| {
            let paths = file.paths.iter();
            (module.clone(), paths.filter_map(|path| resolver.resolve(module, path)).collect())
        })
        .collect()
}

/// Returns the number of the layer of `module`, from 0 for the lowest; `None` for the crate's root.
///
/// # Panics
/// If [`LAYERS`] does not list the module.
fn layer(module: &ModulePath) -> Option<usize> {
    let top = module.first()?;
    let layer = LAYERS.iter().position(|(_, modules)| modules.contains(&top.as_str()));
    assert!(layer.is_some(), "src/{top} belongs to no layer: add it to LAYERS in this test");
    layer
}

/// Describes each import from a higher layer.
fn upward_imports(imports: &Imports) -> Vec<String> {
    let pairs = imports.iter().flat_map(|(from, to)| to.iter().map(move |to| (from, to)));
    pairs
        .filter(|(from, to)| layer(from) < layer(to))
        .map(|(from, to)| format!("{} imports from {}", from.join("::"), to.join("::")))
        .collect()
}

/// Describes each set of modules whose imports form a cycle.
fn cycles(imports: &Imports) -> Vec<String> {
    let reachable: BTreeMap<_, _> =
        imports.keys().map(|module| (module, reachable_from(imports, module))).collect();
    let mut cycles = BTreeSet::new();
    for (module, targets) in &reachable {
        if targets.contains(*module) {
            let members = targets
                .iter()
                .filter(|target| reachable.get(*target).is_some_and(|back| back.contains(*module)));
            let names: Vec<_> = members.map(|member| member.join("::")).collect();
            cycles.insert(names.join(", "));
        }
    }
    cycles.into_iter().collect()
}

fn reachable_from(imports: &Imports, module: &ModulePath) -> BTreeSet<ModulePath> {
    let mut reached = BTreeSet::new();
    let mut open = vec![module];
    while let Some(module) = open.pop() {
        for target in imports.get(module).into_iter().flatten() {
            if reached.insert(target.clone()) {
                open.push(target);
            }
        }
    }
    reached
}

/// Parses each `.rs` file below `folder`, which holds the children of `module`, into `files`.
fn read_folder(folder: &Path, module: &ModulePath, files: &mut BTreeMap<ModulePath, SourceFile>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let child = child_of(module, &stem);
        if path.is_dir() {
            read_folder(&path, &child, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") && stem != "main" {
            let module = if stem == "mod" || stem == "lib" { module.clone() } else { child };
            let file = SourceFile::parse(&fs::read_to_string(&path).unwrap())
                .unwrap_or_else(|error| panic!("{} cannot be parsed: {error}", path.display()));
            files.insert(module, file);
        }
    }
}

/// Returns the imports of `src/`, without the files that are compiled for tests only.
fn imports_of_the_crate() -> Imports {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = BTreeMap::new();
    read_folder(&source, &vec![], &mut files);
    let for_tests: Vec<ModulePath> = files
        .iter()
        .flat_map(|(module, file)| file.test_modules.iter().map(|child| child_of(module, child)))
        .collect();
    files.retain(|module, _| !for_tests.iter().any(|test| module.starts_with(test)));
    imports(&files)
}

/// Returns the imports of a crate whose modules have these names and texts.
fn imports_of_example(files: &[(&str, &str)]) -> Imports {
    let parse = |(module, text): &(&str, &str)| {
        let module = module.split("::").map(str::to_owned).collect();
        (module, SourceFile::parse(text).unwrap())
    };
    imports(&files.iter().map(parse).collect())
}

#[test]
fn no_module_imports_from_a_higher_layer() {
    let imports = imports_of_the_crate();
    assert!(imports.values().map(BTreeSet::len).sum::<usize>() > 300, "the imports were not read");
    assert_eq!(upward_imports(&imports), [""; 0]);
}

#[test]
fn no_imports_form_a_cycle() {
    assert_eq!(cycles(&imports_of_the_crate()), [""; 0]);
}

#[test]
fn an_import_from_a_higher_layer_is_found_in_a_use_a_path_and_a_macro() {
    for text in [
        "use crate::services::Cache;",
        "use crate::{domain::Token, services::{self, Cache}};",
        "fn f() { crate::services::run(); }",
        "fn f() { println!(\"{}\", crate::services::COUNT); }",
        "fn f() { select! { _ = async { super::services::run() } => {} } }",
    ] {
        let imports = imports_of_example(&[("domain", ""), ("store", text), ("services", "")]);
        assert_eq!(upward_imports(&imports), ["store imports from services"], "{text}");
    }
}

#[test]
fn a_cycle_through_a_re_export_is_found() {
    let imports = imports_of_example(&[
        ("store", "pub mod rows; pub mod error; pub use self::error::StoreError;"),
        ("store::rows", "use super::StoreError;"),
        ("store::error", "fn f() { super::rows::read() }"),
    ]);
    assert_eq!(cycles(&imports), ["store::error, store::rows"]);
}

#[test]
fn imports_of_test_code_are_ignored() {
    let imports = imports_of_example(&[
        ("domain", "#[cfg(test)] mod tests { use crate::services::Cache; }"),
        ("services", "use crate::domain::Token;"),
    ]);
    assert_eq!(upward_imports(&imports), [""; 0]);
    assert_eq!(cycles(&imports), [""; 0]);
}
