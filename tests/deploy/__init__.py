"""deploy/: every manifest renders, is valid and keeps the rules. No cluster, no daemon."""
