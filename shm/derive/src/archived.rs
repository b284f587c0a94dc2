//! The expansion of `#[record(archived)]`: a struct or an enum that rkyv writes and that is read in
//! place.

use crate::input::{Input, Refused};
use crate::message;
use proc_macro2::TokenStream;
use quote::quote;
use syn::Data;

/// Expands `#[record(archived)]`.
pub(crate) fn expand(input: &Input) -> Result<TokenStream, Refused> {
    let name = input.item.ident.to_string();
    let schema = match &input.item.data {
        Data::Struct(data) if !data.fields.is_empty() => {
            let fields = input.field_schemas(&data.fields);
            let name = format!("archived struct {name}");
            let path = &input.path;
            quote!(#path::hash::schema(#name, &[#(#fields),*]))
        }
        Data::Enum(data) if !data.variants.is_empty() => enum_schema(input, &name, data),
        Data::Union(_) => return Err(input.refuse(&input.item.ident, message::union(&name))),
        _ => return Err(input.refuse(&input.item.ident, message::empty(&name))),
    };
    let (path, item, ident) = (&input.path, &input.item, &input.item.ident);
    let derives = derives(input);
    let records = input.bounds(&quote!(#path::record::Record));
    Ok(quote! {
        #records
        #derives
        #[rkyv(crate = #path::rkyv, derive(Debug, PartialEq))]
        #item
        const _: () = #path::record::archived::check_layout::<#ident>();
        #path::archived_record!([] #ident, #schema);
    })
}

/// The schema of an enum: its variants in order, each of its name and its fields.
fn enum_schema(input: &Input, name: &str, data: &syn::DataEnum) -> TokenStream {
    let path = &input.path;
    let variants = data.variants.iter().map(|variant| {
        let fields = input.field_schemas(&variant.fields);
        let name = variant.ident.to_string();
        quote!(#path::hash::schema(#name, &[#(#fields),*]))
    });
    let name = format!("archived enum {name}");
    quote!(#path::hash::schema(#name, &[#(#variants),*]))
}

fn derives(input: &Input) -> TokenStream {
    let path = &input.path;
    let more = [
        quote!(#path::rkyv::Archive),
        quote!(#path::rkyv::Serialize),
        quote!(#path::rkyv::Deserialize),
    ];
    input.derives(&["Clone", "Debug", "PartialEq"], &more)
}
