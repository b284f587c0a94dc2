//! The expansion of `#[record]`: a repr(C) struct without padding, read where it lies.
//!
//! Padding and fields that are not plain are refused in our words: known types here, by name; all
//! others by the compiler, from the assertions in the expansion. These stand before the derives'
//! complaints.

use crate::input::{Input, Refused, field_name};
use crate::message;
use proc_macro2::TokenStream;
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Data, Field, Fields, Member, Type};

/// Types that are never plain, by the last segment of their path.
const NEVER_PLAIN: [&str; 21] = [
    "String", "str", "bool", "char", "usize", "isize", "u128", "i128", "Option", "Result", "Vec",
    "Box", "Rc", "Arc", "Cow", "HashMap", "HashSet", "BTreeMap", "BTreeSet", "Duration", "Instant",
];

/// The most padding that a field can be followed by: alignments are 8 at most.
const PADDING_MAX: usize = 7;

/// Expands `#[record]`.
pub(crate) fn expand(input: &Input) -> Result<TokenStream, Refused> {
    let name = input.item.ident.to_string();
    let Data::Struct(data) = &input.item.data else {
        return Err(input.refuse(&input.item.ident, message::not_a_struct(&name)));
    };
    if data.fields.is_empty() {
        return Err(input.refuse(&input.item.ident, message::empty(&name)));
    }
    for (index, field) in data.fields.iter().enumerate() {
        if let Some(ty) = never_plain(&field.ty) {
            let message = message::not_plain(&name, &field_name(index, field), &ty);
            return Err(input.refuse(&field.ty, message));
        }
    }
    let layout = layout(input)?;
    let checks = checks(input, &data.fields);
    let (path, item, ident) = (&input.path, &input.item, &input.item.ident);
    let derives = derives(input);
    let zerocopy = quote!(#path::zerocopy).to_string().replace(' ', "");
    let fields = input.field_schemas(&data.fields);
    let schema = format!("plain {name}");
    Ok(quote! {
        #checks
        #derives
        #[zerocopy(crate = #zerocopy)]
        #layout
        #item
        #path::plain_archive!(#ident);
        #path::plain_record!([] #ident, #path::hash::schema(#schema, &[#(#fields),*]));
    })
}

fn derives(input: &Input) -> TokenStream {
    let path = &input.path;
    let more = [
        quote!(#path::zerocopy::FromBytes),
        quote!(#path::zerocopy::IntoBytes),
        quote!(#path::zerocopy::Immutable),
        quote!(#path::zerocopy::KnownLayout),
    ];
    input.derives(&["Clone", "Copy", "Debug", "PartialEq"], &more)
}

/// `repr(C)`, unless it is there; any other `repr` is refused.
fn layout(input: &Input) -> Result<TokenStream, Refused> {
    let mut layout = quote!(#[repr(C)]);
    for attribute in input.item.attrs.iter().filter(|a| a.path().is_ident("repr")) {
        match attribute.parse_args::<syn::Ident>() {
            Ok(ident) if ident == "C" => layout = TokenStream::new(),
            _ => {
                return Err(input.refuse(attribute, message::layout(&input.item.ident.to_string())));
            }
        }
    }
    Ok(layout)
}

/// The name of a type that cannot be plain, looking into arrays and tuples.
fn never_plain(ty: &Type) -> Option<String> {
    match ty {
        Type::Array(array) => never_plain(&array.elem),
        Type::Group(group) => never_plain(&group.elem),
        Type::Paren(paren) => never_plain(&paren.elem),
        Type::Path(path) => {
            let last = path.path.segments.last()?.ident.to_string();
            NEVER_PLAIN.contains(&last.as_str()).then_some(last)
        }
        Type::Tuple(_) => Some("a tuple".to_owned()),
        Type::Reference(_) | Type::Ptr(_) => Some("a pointer".to_owned()),
        _ => Some(ty.to_token_stream().to_string()),
    }
}

/// Assertions that each field is plain and that none is followed by padding.
fn checks(input: &Input, fields: &Fields) -> TokenStream {
    let path = &input.path;
    let plain = input.bounds(&quote!(#path::record::plain::PlainField));
    let members: Vec<Member> = fields.members().collect();
    let gaps = fields.iter().enumerate().map(|(index, field)| gap(input, &members, index, field));
    quote! {
        #plain
        const _: () = { #(#gaps)* };
    }
}

/// The assertion that the next field (or the end) stands right behind field `index`.
fn gap(input: &Input, members: &[Member], index: usize, field: &Field) -> TokenStream {
    let (ident, ty, member) = (&input.item.ident, &field.ty, &members[index]);
    let end = match members.get(index + 1) {
        Some(next) => quote!(::core::mem::offset_of!(#ident, #next)),
        None => quote!(::core::mem::size_of::<#ident>()),
    };
    let pad = free_name(members);
    let arms = (1..=PADDING_MAX).map(|bytes| {
        let last = index + 1 == members.len();
        let name = field_name(index, field);
        let text = message::padding(&ident.to_string(), &name, bytes, last, pad.as_deref());
        quote_spanned!(field.span()=> #bytes => ::core::panic!(#text),)
    });
    quote! {
        match #end - ::core::mem::offset_of!(#ident, #member) - ::core::mem::size_of::<#ty>() {
            #(#arms)*
            _ => {}
        }
    }
}

/// A name for a padding field that no field has; none in a tuple struct.
fn free_name(members: &[Member]) -> Option<String> {
    let taken = |wanted: &str| {
        members.iter().any(|member| matches!(member, Member::Named(name) if name == wanted))
    };
    if matches!(members.first(), Some(Member::Unnamed(_))) {
        return None;
    }
    let numbered = (2..).map(|number| format!("_pad{number}"));
    std::iter::once("_pad".to_owned()).chain(numbered).find(|name| !taken(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(item: &str) -> String {
        let item = item.parse().expect("test text is Rust");
        let input = Input::parse(quote!(crate = testudo_shm), item);
        let tokens = input.and_then(|input| expand(&input));
        tokens.unwrap_or_else(|refused| refused.tokens()).to_string()
    }

    #[test]
    fn the_expansion_carries_a_message_for_each_amount_of_padding() {
        let text = expanded("struct Event { kind: u8, _pad: [u8; 2], amount: u32 }");
        for bytes in 1..=PADDING_MAX {
            let wanted = message::padding("Event", "kind", bytes, false, Some("_pad2"));
            assert!(text.contains(&wanted), "{wanted}\nis not in\n{text}");
        }
    }

    #[test]
    fn what_cannot_be_plain_is_refused_by_name() {
        let text = expanded("struct Event { kind: [bool; 4] }");
        assert!(text.contains(&message::not_plain("Event", "kind", "bool")), "{text}");
        let text = expanded("enum Event { A, B }");
        assert!(text.contains(&message::not_a_struct("Event")), "{text}");
        let text = expanded("struct Event;");
        assert!(text.contains(&message::empty("Event")), "{text}");
        let text = expanded("#[repr(C, packed)] struct Event { a: u8 }");
        assert!(text.contains(&message::layout("Event")), "{text}");
    }
}
