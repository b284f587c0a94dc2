//! What the attribute was given: its arguments, the type, and the derives that the type has
//! already.
//!
//! Called by the entry point; both expansions work on the result.

use crate::message;
use proc_macro2::{TokenStream, TokenTree};
use quote::{ToTokens, quote, quote_spanned};
use syn::parse::Parser;
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{Attribute, DeriveInput, Field, Fields, Path, Token};

/// The attribute's arguments and its type, checked as far as both forms agree.
pub(crate) struct Input {
    /// `archived` was asked for.
    pub(crate) archived: bool,
    /// Where `testudo_shm` is found.
    pub(crate) path: Path,
    /// The type, as written.
    pub(crate) item: DeriveInput,
}

/// Why there is no record, and the type as written: it stays, so that its other uses are no further
/// errors.
pub(crate) struct Refused {
    error: syn::Error,
    item: TokenStream,
}

impl Refused {
    /// The error, and the type without the attribute.
    pub(crate) fn tokens(self) -> TokenStream {
        let error = self.error.into_compile_error();
        let item = self.item;
        quote!(#error #item)
    }
}

impl Input {
    /// Reads arguments and type.
    pub(crate) fn parse(arguments: TokenStream, item: TokenStream) -> Result<Self, Refused> {
        let refused = |error| Refused { error, item: item.clone() };
        let (archived, path) = parse_arguments(arguments).map_err(refused)?;
        let input = Self { archived, path, item: syn::parse2(item.clone()).map_err(refused)? };
        input.check().map_err(refused)?;
        Ok(input)
    }

    /// An error at `place` of this type.
    pub(crate) fn refuse(&self, place: impl ToTokens, message: impl std::fmt::Display) -> Refused {
        let error = syn::Error::new_spanned(place, message);
        Refused { error, item: self.item.to_token_stream() }
    }

    fn check(&self) -> syn::Result<()> {
        let name = self.item.ident.to_string();
        if !self.item.generics.params.is_empty() {
            let message = message::generics(&name);
            return Err(syn::Error::new_spanned(&self.item.generics, message));
        }
        for field in self.fields() {
            if mentions(field.ty.to_token_stream(), &name) {
                return Err(syn::Error::new_spanned(&field.ty, message::recursion(&name)));
            }
        }
        Ok(())
    }

    /// All fields, of all variants where there are variants.
    pub(crate) fn fields(&self) -> Vec<&Field> {
        match &self.item.data {
            syn::Data::Struct(data) => data.fields.iter().collect(),
            syn::Data::Enum(data) => data.variants.iter().flat_map(|v| v.fields.iter()).collect(),
            syn::Data::Union(data) => data.fields.named.iter().collect(),
        }
    }

    /// A derive attribute with those traits of `core` that the type does not derive by itself, and
    /// with `more`. Only the former are looked for by name: a `Serialize` there is mostly serde's.
    pub(crate) fn derives(&self, core: &[&str], more: &[TokenStream]) -> TokenStream {
        let present = derived(&self.item.attrs);
        let missing = core.iter().filter(|name| !present.iter().any(|have| have == *name));
        let missing = missing.map(|name| match *name {
            "Clone" => quote!(::core::clone::Clone),
            "Copy" => quote!(::core::marker::Copy),
            "Debug" => quote!(::core::fmt::Debug),
            _ => quote!(::core::cmp::PartialEq),
        });
        quote!(#[derive(#(#missing,)* #(#more),*)])
    }

    /// An item that is an error where a field's type is not a `bound`. As an item, it is checked
    /// before the bodies of the derives, so this error stands first.
    pub(crate) fn bounds(&self, bound: &TokenStream) -> TokenStream {
        let bounds = self.fields().into_iter().map(|field| {
            let ty = &field.ty;
            let place = |mut token: TokenTree| {
                token.set_span(ty.span());
                token
            };
            // All of it stands at the type, so that the compiler points there.
            let bound: TokenStream = bound.clone().into_iter().map(place).collect();
            quote_spanned!(ty.span()=> #ty: #bound)
        });
        quote! {
            const _: () = {
                #[allow(dead_code, trivial_bounds, reason = "this is here for its errors only")]
                struct Fields where #(#bounds),*;
            };
        }
    }

    /// Expressions of the schema hashes of `fields`: each of its name and its type's schema.
    pub(crate) fn field_schemas(&self, fields: &Fields) -> Vec<TokenStream> {
        let path = &self.path;
        let schema = |(index, field): (usize, &Field)| {
            let name = field_name(index, field);
            let ty = &field.ty;
            // The type's own place, so that a field that is no record is where the compiler points.
            let of_type = quote_spanned!(ty.span()=> <#ty as #path::record::Record>::schema());
            quote!(#path::hash::schema(#name, &[#of_type]))
        };
        fields.iter().enumerate().map(schema).collect()
    }
}

/// A field's name, or its number in a tuple struct.
pub(crate) fn field_name(index: usize, field: &Field) -> String {
    field.ident.as_ref().map_or_else(|| index.to_string(), ToString::to_string)
}

fn parse_arguments(arguments: TokenStream) -> syn::Result<(bool, Path)> {
    let mut archived = false;
    let mut path: Path = syn::parse_quote!(::testudo::shm);
    let parser = syn::meta::parser(|meta| {
        if meta.path.is_ident("archived") {
            archived = true;
        } else if meta.path.is_ident("crate") {
            path = meta.value()?.call(Path::parse_mod_style)?;
        } else {
            return Err(meta.error(message::ARGUMENT));
        }
        Ok(())
    });
    parser.parse2(arguments)?;
    Ok((archived, path))
}

/// Last path segments of all derives among `attributes`.
fn derived(attributes: &[Attribute]) -> Vec<String> {
    let mut names = Vec::new();
    for attribute in attributes.iter().filter(|a| a.path().is_ident("derive")) {
        let paths = Punctuated::<Path, Token![,]>::parse_terminated;
        // What does not parse here is the compiler's to report.
        let paths = attribute.parse_args_with(paths).unwrap_or_default();
        names.extend(paths.iter().filter_map(|p| p.segments.last()).map(|s| s.ident.to_string()));
    }
    names
}

/// True when `tokens` contain the identifier `name` or `Self`.
fn mentions(tokens: TokenStream, name: &str) -> bool {
    tokens.into_iter().any(|token| match token {
        TokenTree::Group(group) => mentions(group.stream(), name),
        TokenTree::Ident(ident) => ident == name || ident == "Self",
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &str, item: &str) -> Result<Input, String> {
        let tokens = |text: &str| text.parse::<TokenStream>().expect("test text is Rust");
        Input::parse(tokens(arguments), tokens(item)).map_err(|refused| refused.error.to_string())
    }

    #[test]
    fn the_crate_path_is_an_argument_with_a_default() {
        let path = |arguments| {
            let input = parse(arguments, "struct A { a: u8 }").expect("accepted");
            input.path.to_token_stream().to_string().replace(' ', "")
        };
        assert_eq!(path(""), "::testudo::shm");
        assert_eq!(path("archived"), "::testudo::shm");
        assert_eq!(path("crate = testudo_shm"), "testudo_shm");
        assert_eq!(path("archived, crate = crate"), "crate");
    }

    #[test]
    fn an_unknown_argument_is_refused_with_the_known_ones() {
        let error = parse("packed", "struct A { a: u8 }").err().expect("refused");
        assert_eq!(error, message::ARGUMENT);
    }

    #[test]
    fn a_type_that_contains_itself_or_has_parameters_is_refused() {
        let error = parse("archived", "struct A { a: Vec<(u8, A)> }").err();
        assert_eq!(error, Some(message::recursion("A")));
        let error = parse("archived", "enum A { One(Vec<Self>) }").err();
        assert_eq!(error, Some(message::recursion("A")));
        let error = parse("", "struct A<T> { a: T }").err();
        assert_eq!(error, Some(message::generics("A")));
    }

    #[test]
    fn derives_that_the_type_has_are_not_added() {
        let input = parse("", "#[derive(Clone, std::fmt::Debug)] struct A { a: u8 }");
        let derives = input.expect("accepted").derives(&["Clone", "Copy", "Debug"], &[]);
        assert_eq!(derives.to_string(), quote!(#[derive(::core::marker::Copy,)]).to_string());
    }
}
