"""Cases: stages, numbers, class codes, places and clocks. Pure decisions; the desk writes."""
