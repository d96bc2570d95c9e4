from bench.simulation import rates_table


def test_simulator_table_names_codes_and_cores():
    rates = {"no": 1.0, "sphere": 2.0, "vort": 3.0, "all": 1.6}
    lines = rates_table({("a", 1): rates, ("b", 2): rates}).splitlines()
    assert lines[1].split() == ["a,", "1", "core", "1.0", "2.0", "3.0", "1.6"] and lines[2].startswith("b, 2 cores")
