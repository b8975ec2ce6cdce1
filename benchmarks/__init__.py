"""Speed, memory and recovery of factors, measured: what is compared, how, and the tables of docs/ made from the rows."""
