//! Sources, chat templates, masks, tokenisation, packing, and the global order of rows.
