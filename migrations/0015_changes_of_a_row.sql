-- Finds the last recorded change of a row, without reading all changes: whether an update that changes no value has to
-- be recorded (token_broker_is_recorded), and which numbers rows have had (token_broker_begin_ids).
create index changes_of_row on changes (table_name, row_id, id);
